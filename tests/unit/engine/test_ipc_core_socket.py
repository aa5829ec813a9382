# SPDX-License-Identifier: Apache-2.0
"""The core's end of the socket: how many messages there are, and for whom."""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fakes.core_client import FACTS
from wavetrain_engine.command import Add, Shutdown
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.ipc import core_socket
from wavetrain_engine.ipc.connection import Connection
from wavetrain_engine.ipc.core_socket import CoreSocket
from wavetrain_engine.ipc.frames import Hello, Hold, Ready, Updates, decode_core_frame, encode
from wavetrain_engine.ipc.held_updates import HeldUpdates
from wavetrain_engine.ipc.stats_reader import StatsReader
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams

_TIMEOUT_MS = 10_000


def request_of(request_id: str, **params: Any) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=[1], sampling_params=SamplingParams(**params))


def news(request_id: str, token_id: int, **fields: Any) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, new_token_ids=[token_id], **fields)


def told(updates: list[RequestUpdate]) -> dict[str, list[int]]:
    return {update.request_id: update.new_token_ids for update in updates}


class Model:
    """A model's end, without its thread."""

    def __init__(self, path: Path) -> None:
        self._connection = Connection.to(path)
        self._poller = select.poll()
        self._poller.register(self._connection, select.POLLIN)
        self._connection.send(encode(Hello(pid=os.getpid())))

    def add(self, request_id: str) -> None:
        self._connection.send(encode(Add(request=request_of(request_id))))

    def hold(self, for_s: float) -> None:
        self._connection.send(encode(Hold(until_s=time.monotonic() + for_s)))

    def close(self) -> None:
        self._connection.close()

    def messages(self) -> list[Updates]:
        """All news that have come; waits for the first message."""
        assert self._poller.poll(_TIMEOUT_MS)
        found: list[Updates] = []
        while self._poller.poll(50) and not self._connection.is_closed:
            for message in self._connection.receive():
                frame = decode_core_frame(message)
                if not isinstance(frame, Ready):
                    assert isinstance(frame, Updates)
                    found.append(frame)
        return found


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="wt") as folder:  # pytest's own folders are too deep for a socket
        yield Path(folder, "core")


def test_a_step_is_one_message_for_all_requests_of_a_model(path: Path) -> None:
    core = CoreSocket(path, os.getpid())
    models = [Model(path), Model(path)]
    for index in range(32):
        models[index % 2].add(f"r{index}")
    num_added = 0
    while num_added < 32:
        num_added += len(core.drain(10.0))
    for step in range(3):
        reason = FinishReason.LENGTH if step == 2 else None
        core.emit(
            [RequestUpdate(request_id=f"r{index}", new_token_ids=[step], finish_reason=reason) for index in range(32)]
        )
        for parity, model in enumerate(models):
            (message,) = model.messages()
            assert [update.request_id for update in message.updates] == [f"r{index}" for index in range(parity, 32, 2)]
    for model in models:
        model.close()
    core.close()


def test_a_model_that_holds_gets_many_steps_in_one_message(path: Path) -> None:
    core = CoreSocket(path, os.getpid())
    model = Model(path)
    model.add("a")
    assert len(core.drain(10.0)) == 1
    core.emit([news("a", 0)])
    assert [told(message.updates) for message in model.messages()] == [{"a": [0]}]
    model.hold(3600.0)
    model.add("b")
    assert len(core.drain(10.0)) == 1  # what came before the request was read before it
    for token_id in range(1, 9):
        core.emit([news("a", token_id)])
    core.emit([news("a", 9), news("b", 0)])
    assert [told(message.updates) for message in model.messages()] == [{"b": [0]}]
    core.emit([news("a", 10, finish_reason=FinishReason.LENGTH)])
    assert [told(message.updates) for message in model.messages()] == [{"a": list(range(1, 11))}]
    model.close()
    core.close()


def test_a_model_that_does_not_read_holds_nobody_up_and_loses_nothing(path: Path) -> None:
    core, slow = start_core(path, 1, "cuda:0")
    other = Model(path)
    other.add("other")
    while not core.drain(10.0):
        pass
    tokens = list(range(100_000))
    for _ in range(20):  # several times what the kernel keeps for it
        core.emit([RequestUpdate(request_id="r0", new_token_ids=tokens)])
    core.emit([news("other", 7)])
    assert [told(message.updates) for message in other.messages()] == [{"other": [7]}]
    found: list[int] = []
    while len(found) < 20 * len(tokens):
        core.drain(0.0)
        found += [token_id for message in slow.messages() for token_id in message.updates[0].new_token_ids]
    assert found == tokens * 20
    for model in (slow, other):
        model.close()
    core.close()


def test_what_says_no_hello_is_no_client(path: Path) -> None:
    core, model = start_core(path, 0, "cpu")
    reader = StatsReader(path)
    reader.close()
    assert core.drain(0.2) == []
    model.close()
    assert [type(command) for command in core.drain(10.0)] == [Shutdown]
    core.close()


def test_held_news_go_when_their_time_has_come() -> None:
    held = HeldUpdates()
    held.hold(10.0)
    for request_id in ("a", "b"):
        held.expect(request_of(request_id))
        held.add(news(request_id, 0))
    assert told(held.take(1.0)) == {"a": [0], "b": [0]}
    for token_id in (1, 2):
        held.add(news("a", token_id))
        held.add(news("b", token_id))
    assert held.take(9.9) == []
    assert told(held.take(10.0)) == {"a": [1, 2], "b": [1, 2]}
    held.add(news("a", 3))
    assert told(held.take(10.1)) == {"a": [3]}


def test_news_of_a_request_with_stop_strings_are_never_held() -> None:
    held = HeldUpdates()
    held.hold(10.0)
    held.expect(request_of("a", stop=["x"]))
    for token_id in range(3):
        held.add(news("a", token_id))
        assert told(held.take(1.0)) == {"a": [token_id]}


def test_a_first_token_is_not_held_when_something_came_before_it() -> None:
    held = HeldUpdates()
    held.hold(10.0)
    held.expect(request_of("a"))
    held.add(RequestUpdate(request_id="a"))
    held.take(1.0)
    held.add(news("a", 0))
    assert told(held.take(1.0)) == {"a": [0]}


def test_an_error_comes_after_what_was_held() -> None:
    held = HeldUpdates()
    held.hold(10.0)
    held.expect(request_of("a"))
    held.add(news("a", 0))
    held.take(1.0)
    held.add(news("a", 1))
    held.add(news("a", 2))
    error = RequestUpdate(request_id="a", finish_reason=FinishReason.ERROR, error_code=ErrorCode.DEADLINE, error="x")
    held.add(error)
    first, second = held.take(1.0)
    assert (first.new_token_ids, first.error_code) == ([1, 2], None)
    assert second == error


def start_core(path: Path, num_requests: int, device: str) -> tuple[CoreSocket, Model]:
    """A loaded core with running requests r0, r1, ... of one model."""
    core = CoreSocket(path, os.getpid())
    model = Model(path)
    core.report_ready(msgspec.structs.replace(FACTS, device=device), lambda: pytest.fail("nobody asks"))
    for index in range(num_requests):
        model.add(f"r{index}")
    num_added = 0
    while num_added < num_requests:
        num_added += len(core.drain(10.0))
    return core, model


def test_the_step_after_a_lone_requests_first_token_waits_for_those_who_send_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_socket, "_FIRST_TOKEN_PAUSE_S", 60.0)
    core, model = start_core(path, 1, "cpu")
    core.emit([news("r0", 7)])
    later = threading.Timer(0.2, model.add, ("r1",))
    later.start()
    assert [type(command) for command in core.drain(0.0)] == [Add]  # it was still waiting
    later.join()
    core.emit([news("r0", 8)])
    assert core.drain(0.0) == []  # for its second token nothing waits
    model.close()
    core.close()


@pytest.mark.parametrize(("num_requests", "device"), [(2, "cpu"), (1, "cuda:0")])
def test_no_step_waits_where_others_would_pay_or_the_cores_are_free(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_requests: int,
    device: str,
) -> None:
    monkeypatch.setattr(core_socket, "_FIRST_TOKEN_PAUSE_S", 3600.0)
    core, model = start_core(path, num_requests, device)
    core.emit([news("r0", 7)])
    assert core.drain(0.0) == []
    model.close()
    core.close()
