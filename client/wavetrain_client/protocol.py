# SPDX-License-Identifier: Apache-2.0
"""The border to tritonclient, which has no types of its own; only this module imports it.

Both shells open one call for each request, on one channel of their own, grpc's or grpc.aio's (docs/decisions/0013).
Requests are made by `wire.py` in the terms of no library; here they become tritonclient's messages.
"""

from __future__ import annotations

from typing import Any, cast

from wavetrain_client.wire import WireRequest

try:
    from tritonclient.grpc import service_pb2, service_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
except ImportError as error:  # pragma: no cover - needs an environment without it
    raise ImportError(
        "wavetrain_client needs tritonclient with gRPC; install it with: pip install 'tritonclient[grpc]>=2.51,<3'"
    ) from error

_messages = cast("Any", service_pb2)
_stubs = cast("Any", service_pb2_grpc)

ModelReadyRequest: Any = _messages.ModelReadyRequest
ServerReadyRequest: Any = _messages.ServerReadyRequest
_STREAM_INFER = f"/{_messages.DESCRIPTOR.services_by_name['GRPCInferenceService'].full_name}/ModelStreamInfer"


class InferenceStub:
    """The calls that the clients make, on a channel of grpc or of grpc.aio."""

    def __init__(self, channel: Any) -> None:
        stub = _stubs.GRPCInferenceServiceStub(channel)
        self.server_ready: Any = stub.ServerReady
        self.model_ready: Any = stub.ModelReady
        # tritonclient's stub streams requests: the message would follow the headers, from an iterator that the blocking
        # library reads in a thread of its own. What goes over the wire for one request is the same.
        self._stream_infer: Any = channel.unary_stream(
            _STREAM_INFER,
            request_serializer=_messages.ModelInferRequest.SerializeToString,
            response_deserializer=_messages.ModelStreamInferResponse.FromString,
        )

    def stream_infer(self, request: WireRequest, timeout_s: float | None) -> Any:
        """Starts the stream RPC with one request, which is all that it will carry; returns the library's call."""
        return self._stream_infer(to_message(request), timeout=timeout_s)


def to_message(request: WireRequest) -> Any:
    """The request as a ModelInferRequest."""
    message = _messages.ModelInferRequest(model_name=request.model, id=request.id)
    for tensor in request.tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name, value in request.parameters.items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
        else:
            message.parameters[name].int64_param = value
    return message
