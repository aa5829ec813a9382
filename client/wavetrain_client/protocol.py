# SPDX-License-Identifier: Apache-2.0
"""The border to tritonclient: its protobuf messages and its stub, which have no types of their own.

Only this module imports `tritonclient`. `wire.py` builds messages of these classes; the two shells open calls with
the stub, one per request, over a `grpc` or a `grpc.aio` channel. tritonclient's own `InferenceServerClient` is not
used: it allows one stream per object in its sync form, keeps the call's status to itself, and wraps each response
in an object that looks tensors up by scanning.
"""

from __future__ import annotations

from typing import Any, cast

try:
    from tritonclient.grpc import service_pb2, service_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
except ImportError as error:  # pragma: no cover - needs an environment without it
    raise ImportError(
        "wavetrain_client needs tritonclient with gRPC; install it with: pip install 'tritonclient[grpc]>=2.51,<3'"
    ) from error

_messages = cast("Any", service_pb2)
_stubs = cast("Any", service_pb2_grpc)

ModelInferRequest: Any = _messages.ModelInferRequest
ModelInferResponse: Any = _messages.ModelInferResponse
ModelReadyRequest: Any = _messages.ModelReadyRequest
ModelStreamInferResponse: Any = _messages.ModelStreamInferResponse
ServerReadyRequest: Any = _messages.ServerReadyRequest
GRPCInferenceServiceStub: Any = _stubs.GRPCInferenceServiceStub
