# SPDX-License-Identifier: Apache-2.0
"""The core's end of the socket: how many messages there are, and for whom."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from fakes.core_client import FACTS
from wavetrain_engine.command import Add
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.ipc import core_socket
from wavetrain_engine.ipc.core_socket import CoreSocket
from wavetrain_engine.ipc.frames import Hello, Hold, Updates, decode_core_frame, encode
from wavetrain_engine.ipc.held_updates import HeldUpdates
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

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(address)
        self._socket.send(encode(Hello(pid=os.getpid())))

    def add(self, request_id: str) -> None:
        self._socket.send(encode(Add(request=request_of(request_id))))

    def hold(self, for_s: float) -> None:
        self._socket.send(encode(Hold(until_s=time.monotonic() + for_s)))

    def close(self) -> None:
        self._socket.close(linger=0)

    def messages(self) -> list[Updates]:
        """All that have come; waits for the first."""
        assert self._socket.poll(_TIMEOUT_MS)
        found: list[Updates] = []
        while self._socket.poll(50):
            frame = decode_core_frame(self._socket.recv())
            assert isinstance(frame, Updates)
            found.append(frame)
        return found


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="wt") as folder:
        yield f"ipc://{folder}/core"


def test_a_step_is_one_message_for_all_requests_of_a_model(address: str) -> None:
    core = CoreSocket(address, os.getpid())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    models = [Model(context, address), Model(context, address)]
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
    core.close()
    context.destroy(linger=0)


def test_a_model_that_holds_gets_many_steps_in_one_message(address: str) -> None:
    core = CoreSocket(address, os.getpid())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    model = Model(context, address)
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
    core.close()
    context.destroy(linger=0)


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


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def start_core(
    context: zmq.Context[zmq.Socket[bytes]], address: str, num_requests: int, device: str
) -> tuple[CoreSocket, Model]:
    """A loaded core with running requests r0, r1, ... of one model."""
    core = CoreSocket(address, os.getpid())
    model = Model(context, address)
    core.report_ready(msgspec.structs.replace(FACTS, device=device), lambda: pytest.fail("nobody asks"))
    for index in range(num_requests):
        model.add(f"r{index}")
    num_added = 0
    while num_added < num_requests:
        num_added += len(core.drain(10.0))
    return core, model


def test_the_step_after_a_lone_requests_first_token_waits_for_those_who_send_it(
    context: zmq.Context[zmq.Socket[bytes]], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_socket, "_FIRST_TOKEN_PAUSE_S", 60.0)
    core, model = start_core(context, address, 1, "cpu")
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
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    num_requests: int,
    device: str,
) -> None:
    monkeypatch.setattr(core_socket, "_FIRST_TOKEN_PAUSE_S", 3600.0)
    core, model = start_core(context, address, num_requests, device)
    core.emit([news("r0", 7)])
    assert core.drain(0.0) == []
    model.close()
    core.close()
