# SPDX-License-Identifier: Apache-2.0
"""A Triton server in the test's own process: grpc.aio, the RPCs our client uses, scripted behaviour.

A script is an async generator over one request; what it yields goes out as a response:
    reply("text", ...)        a response with tensors
    "busy: full"              an error message on the stream, as the Triton server sends it
and it may raise `Abort(code, details)` to break the call, or wait. Requests and cancels are recorded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

Script = Callable[["ReceivedRequest"], AsyncIterator[Any]]


class Abort(Exception):
    """Ends the call with a gRPC status."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__(details)
        self.code = code
        self.details = details


@dataclass(frozen=True)
class ReceivedRequest:
    """One ModelInferRequest, decoded without any code of the client under test."""

    model: str
    request_id: str
    inputs: dict[str, Any]
    shapes: dict[str, list[int]]
    datatypes: dict[str, str]
    parameters: dict[str, Any]
    time_remaining_s: float | None

    @classmethod
    def read(cls, message: Any, time_remaining_s: float | None) -> ReceivedRequest:
        inputs, shapes, datatypes = {}, {}, {}
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
            if tensor.datatype == "BYTES":
                values = [bytes(value) for value in deserialize_bytes_tensor(raw)]
            else:
                values = np.frombuffer(raw, dtype=triton_to_np_dtype(tensor.datatype)).tolist()
            inputs[tensor.name], shapes[tensor.name] = values, list(tensor.shape)
            datatypes[tensor.name] = tensor.datatype
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in message.parameters.items()
        }
        return cls(message.model_name, message.id, inputs, shapes, datatypes, parameters, time_remaining_s)


def tensor_response(**outputs: tuple[str, list[int], list[Any]]) -> Any:
    """Builds a stream response: name=(data type, shape, values)."""
    response = service_pb2.ModelStreamInferResponse()
    for name, (datatype, shape, values) in outputs.items():
        entry = response.infer_response.outputs.add(name=name, datatype=datatype, shape=shape)
        if datatype == "BYTES":
            encoded = [value if isinstance(value, bytes) else value.encode() for value in values]
            raw = serialize_byte_tensor(np.array(encoded, dtype=object)).item() if encoded else b""
        else:
            raw = np.array(values, dtype=triton_to_np_dtype(datatype)).tobytes()
        response.infer_response.raw_output_contents.append(raw)
        assert list(entry.shape) == shape
    return response


def reply(text: str | bytes, finish_reason: str | None = None, *, num_tokens: int = 1, num_input: int = 3) -> Any:
    """Builds a response in the dialect of `llm`."""
    return tensor_response(
        text_output=("BYTES", [1], [text]),
        finish_reason=("BYTES", [1], [finish_reason or ""]),
        num_input_tokens=("UINT32", [1], [num_input]),
        num_output_tokens=("UINT32", [1], [num_tokens]),
    )


def legacy_reply(text: str, *, num_tokens: int = 1, num_input: int = 3) -> Any:
    """Builds a response in the dialect of `ensemble`."""
    return tensor_response(
        text_output=("BYTES", [1, 1], [text]),
        num_input_tokens=("INT32", [1, 1], [num_input]),
        num_output_tokens=("INT32", [1, 1], [num_tokens]),
    )


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The servicer; `script` answers each streamed request but stop requests, which are answered with nothing."""

    script: Script
    is_ready: bool = True
    models: set[str] = field(default_factory=lambda: {"llm", "ensemble", "engine"})
    port: int = 0
    requests: list[ReceivedRequest] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    was_cancelled: threading.Event = field(default_factory=threading.Event)
    was_stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802 - names of the protocol
        return service_pb2.ServerReadyResponse(ready=self.is_ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name in self.models)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ModelInfer RPC doesn't support decoupled models")

    async def ModelStreamInfer(self, messages: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        request = ReceivedRequest.read(await anext(messages), context.time_remaining())
        if request.inputs.get("stop") == [True]:
            self.stopped.append(request.request_id)
            self.was_stopped.set()
            return
        self.requests.append(request)
        self.started.set()
        if request.model not in self.models:
            yield _error(f"Request for unknown model: '{request.model}' is not found")
            return
        is_cancelled = True
        try:
            async for response in self.script(request):
                yield _error(response) if isinstance(response, str) else response
            is_cancelled = False
        except Abort as abort:
            is_cancelled = False
            await context.abort(abort.code, abort.details)
        finally:
            # CancelledError where the script waits; GeneratorExit where a response was being sent.
            if is_cancelled:
                self.cancelled.append(request.request_id)
                self.was_cancelled.set()


def _error(message: str) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message=message)


@asynccontextmanager
async def serve(fake: FakeTriton, *, max_message_bytes: int = 4 << 20) -> AsyncIterator[FakeTriton]:
    """Serves the fake in the running loop."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", max_message_bytes)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(grace=0)


@contextmanager
def serve_in_thread(fake: FakeTriton):
    """Serves the fake in a thread with a loop of its own, for the blocking client."""
    loop = asyncio.new_event_loop()
    is_up = threading.Event()

    async def run(stop: asyncio.Event) -> None:
        async with serve(fake):
            is_up.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(stop)), name="fake-triton")
    thread.start()
    try:
        assert is_up.wait(10), "the fake Triton server did not start"
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
