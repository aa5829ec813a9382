# SPDX-License-Identifier: Apache-2.0
"""The core's end of the socket: how many messages there are, and for whom."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import zmq

from wavetrain_engine.command import Add
from wavetrain_engine.ipc.core_socket import CoreSocket
from wavetrain_engine.ipc.frames import Hello, Updates, decode_core_frame, encode
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams

_TIMEOUT_MS = 10_000


class Model:
    """A model's end, without its thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(address)
        self._socket.send(encode(Hello(pid=os.getpid())))

    def add(self, request_id: str) -> None:
        request = EngineRequest(request_id=request_id, prompt_token_ids=[1], sampling_params=SamplingParams())
        self._socket.send(encode(Add(request=request)))

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
