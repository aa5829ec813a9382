# SPDX-License-Identifier: Apache-2.0
"""Messages between two ends: whole, in order, none lost, nobody kept waiting."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavetrain_engine.ipc.connection import Connection

# More than the kernel keeps for an end that does not read.
_LARGE = 1 << 20


def connected() -> tuple[Connection, Connection]:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Connection(first), Connection(second)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    pair = connected()
    yield pair
    for end in pair:
        end.close()


@given(
    messages=st.lists(
        st.one_of(st.binary(max_size=20), st.integers(0, 300_000).map(lambda size: bytes([size % 251]) * size)),
        max_size=12,
    ),
    reads=st.lists(st.booleans(), max_size=12),
)
def test_messages_arrive_whole_and_in_order_whenever_the_other_end_reads(
    messages: list[bytes], reads: list[bool]
) -> None:
    sender, receiver = connected()
    received: list[bytes] = []
    for index, message in enumerate(messages):
        sender.send(message)
        if index < len(reads) and reads[index]:
            received += receiver.receive()
    while sender.has_backlog:
        sender.flush()
        received += receiver.receive()
    received += receiver.receive() + receiver.receive()
    assert received == messages
    assert not receiver.is_closed
    sender.close()
    receiver.close()


def test_a_backlog_is_polled_for_until_it_is_sent(ends: tuple[Connection, Connection]) -> None:
    sender, receiver = ends
    assert sender.wanted_events == select.POLLIN
    sender.send(bytes(_LARGE))
    sender.send(b"after it")
    assert sender.has_backlog
    assert sender.wanted_events == select.POLLIN | select.POLLOUT
    received: list[bytes] = []
    while sender.has_backlog:
        received += receiver.receive()
        sender.flush()
    received += receiver.receive()
    assert [len(message) for message in received] == [_LARGE, len(b"after it")]
    assert sender.wanted_events == select.POLLIN


def test_last_words_are_heard_before_the_end(ends: tuple[Connection, Connection]) -> None:
    sender, receiver = ends
    receiver.send(b"never read")
    sender.send(b"last words")
    sender.close()
    received = receiver.receive()
    while not receiver.is_closed:
        received += receiver.receive()
    assert received == [b"last words"]


def test_half_a_message_is_none(ends: tuple[Connection, Connection]) -> None:
    sender, receiver = ends
    sender.send(bytes(_LARGE))
    sender.close()
    while not receiver.is_closed:
        assert receiver.receive() == []


def test_sending_to_an_end_that_is_gone_is_no_error(ends: tuple[Connection, Connection]) -> None:
    sender, receiver = ends
    sender.send(bytes(_LARGE))
    receiver.close()
    sender.flush()
    sender.send(b"more")
    assert not sender.has_backlog
    assert sender.receive() == []
    assert sender.is_closed


def test_closing_lingers_no_longer_than_it_may(ends: tuple[Connection, Connection]) -> None:
    sender, receiver = ends
    sender.send(bytes(_LARGE))
    sender.close(linger_s=0.01)  # nobody reads
    sender.close(linger_s=0.01)
    assert receiver.receive() == []


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Connection.to(tmp_path / "core")
