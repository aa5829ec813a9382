# SPDX-License-Identifier: Apache-2.0
"""triton_python_backend_utils as our models use it, without a server. Importing it puts it in the real one's place.

As the real one of server 2.51, it dies when a request is asked anything after its last response.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any, ClassVar

import numpy as np

sys.modules.setdefault("triton_python_backend_utils", sys.modules[__name__])

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error

    def values(self) -> dict[str, Any]:
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


class ResponseSender:
    """Records what is sent. `is_final` is set with the last response."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.is_final = threading.Event()
        self.is_given_up = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_final.is_set(), "a response after the last one"
        if response is not None:
            self.responses.append(response)
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.is_final.set()

    def is_cancelled(self) -> bool:
        assert not self.is_final.is_set(), "the server has freed this request: the real one crashes here"
        return self.is_given_up


class InferenceRequest:
    """A request as a model sees it: `inputs` by name, with the shapes that arrive at the model."""

    def __init__(
        self,
        inputs: dict[str, np.ndarray[Any, Any]],
        *,
        request_id: str = "",
        parameters: dict[str, Any] | None = None,
        timeout_us: int = 0,
        outputs: list[str] | None = None,
    ) -> None:
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self._request_id = request_id
        self._parameters = json.dumps(parameters or {})
        self._timeout_us = timeout_us
        self._outputs = outputs or []
        self.sender = ResponseSender()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._request_id

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self._timeout_us

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def get_response_sender(self) -> ResponseSender:
        return self.sender


class Logger:
    @staticmethod
    def log_info(message: str) -> None:
        pass

    log_warn = log_error = log_info


class Metric:
    """A number of a MetricFamily."""

    def __init__(self, kind: int) -> None:
        self._kind, self._value = kind, 0.0

    def increment(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE or value >= 0, "the real one refuses a counter that falls"
        self._value += value

    def set(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE, "the real one sets gauges only"
        self._value = value

    def value(self) -> float:
        return self._value


class MetricFamily:
    """Keeps what it made: `page` shows it as name, labels, value."""

    COUNTER, GAUGE, HISTOGRAM = range(3)
    page: ClassVar[dict[tuple[str, frozenset[tuple[str, str]]], Metric]] = {}

    def __init__(self, name: str, description: str, kind: int) -> None:
        self._name, self._kind = name, kind

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 - the real one's name
        metric = self.page[self._name, frozenset(labels.items())] = Metric(self._kind)
        return metric
