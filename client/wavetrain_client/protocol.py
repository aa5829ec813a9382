# SPDX-License-Identifier: Apache-2.0
"""The border to tritonclient, which has no types of its own; only this module imports it.

The asyncio shell speaks through tritonclient's own `InferenceServerClient` (grpc.aio): one call per request, any
number of calls on its channel. The blocking shell opens calls with tritonclient's stub on a channel of its own, as
tritonclient's blocking client has one stream per object (docs/decisions/0013). Requests are made by `wire.py` in the
terms of no library; here they become what either takes.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from wavetrain_client.wire import WireRequest

try:
    from tritonclient import utils  # pyright: ignore[reportMissingTypeStubs]
    from tritonclient.grpc import aio, service_pb2, service_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
except ImportError as error:  # pragma: no cover - needs an environment without it
    raise ImportError(
        "wavetrain_client needs tritonclient with gRPC; install it with: pip install 'tritonclient[grpc]>=2.51,<3'"
    ) from error

_messages = cast("Any", service_pb2)
_stubs = cast("Any", service_pb2_grpc)
_aio = cast("Any", aio)
_utils = cast("Any", utils)

AsyncInferenceClient: Any = _aio.InferenceServerClient
InferenceServerException: Any = _utils.InferenceServerException
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


def to_stream_inputs(request: WireRequest) -> dict[str, Any]:
    """The request as what `AsyncInferenceClient.stream_infer` takes from its iterator."""
    inputs: list[Any] = []
    for tensor in request.tensors:
        array = np.array(tensor.values(), dtype=_utils.triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
        item = _aio.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
        item.set_data_from_numpy(array)
        inputs.append(item)
    return {
        "model_name": request.model,
        "inputs": inputs,
        "request_id": request.id,
        "parameters": dict(request.parameters),
    }
