# SPDX-License-Identifier: Apache-2.0
"""The border to tritonclient, which has no types of its own; only this module imports it.

Both shells open calls with tritonclient's stub, one for each request, on one channel of their own, grpc's or grpc.aio's
(docs/decisions/0013). Requests are made by `wire.py` in the terms of no library; here they become its messages.
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
GRPCInferenceServiceStub: Any = _stubs.GRPCInferenceServiceStub


def to_message(request: WireRequest) -> Any:
    """The request as a ModelInferRequest, for the stub."""
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
