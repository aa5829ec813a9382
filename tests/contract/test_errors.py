# SPDX-License-Identifier: Apache-2.0
"""One error, three trees: what the engine raises, what the Triton server is told, what the client makes of it."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wavetrain_client import errors as client_errors
from wavetrain_engine import errors
from wavetrain_engine.errors import ErrorCode, WavetrainError

ERROR_CODES = Path(__file__).resolve().parents[2] / "engine/wavetrain_engine/serving/error_codes.py"
# The table of the Triton server's status codes that the Python backend offers.
TRITON_CODES = (
    "UNKNOWN",
    "INTERNAL",
    "NOT_FOUND",
    "INVALID_ARG",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
)
EXPECTED = {
    errors.ConfigError: (ErrorCode.INVALID, "INVALID_ARG", client_errors.RequestRejected),
    errors.CheckpointError: (ErrorCode.INVALID, "INVALID_ARG", client_errors.RequestRejected),
    errors.UnsupportedModelError: (ErrorCode.INVALID, "INVALID_ARG", client_errors.RequestRejected),
    errors.RequestError: (ErrorCode.INVALID, "INVALID_ARG", client_errors.RequestRejected),
    errors.InvalidSamplingParams: (ErrorCode.INVALID, "INVALID_ARG", client_errors.RequestRejected),
    errors.PromptTooLong: (ErrorCode.INVALID, "INVALID_ARG", client_errors.RequestRejected),
    errors.UnknownAdapter: (ErrorCode.NOT_FOUND, "NOT_FOUND", client_errors.RequestRejected),
    errors.CapacityError: (ErrorCode.BUSY, "UNAVAILABLE", client_errors.ServerBusy),
    errors.QueueFull: (ErrorCode.BUSY, "UNAVAILABLE", client_errors.ServerBusy),
    errors.RequestCancelled: (ErrorCode.CANCELLED, "CANCELLED", client_errors.Cancelled),
    errors.DeadlineExceeded: (ErrorCode.DEADLINE, "CANCELLED", client_errors.DeadlineExceeded),
    errors.RequestFailed: (ErrorCode.INTERNAL, "INTERNAL", client_errors.ServerFailed),
    errors.EngineDead: (ErrorCode.DEAD, "UNAVAILABLE", client_errors.ServerFailed),
}


def all_errors(root: type[WavetrainError] = WavetrainError) -> Iterator[type[WavetrainError]]:
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:  # tests make their own
            yield kind
            yield from all_errors(kind)


class TritonError:
    """As the Python backend's: a message and a status code."""

    def __init__(self, message: str, code: str) -> None:
        self.message = message
        self.code = code


@pytest.fixture
def error_codes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """serving/error_codes.py on a stand-in for the module that only the Triton server has."""
    for code in TRITON_CODES:
        monkeypatch.setattr(TritonError, code, code, raising=False)
    backend = types.ModuleType("triton_python_backend_utils")
    backend.TritonError = TritonError  # type: ignore[attr-defined]
    backend.InferenceResponse = lambda error: types.SimpleNamespace(error=error)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    spec = importlib.util.spec_from_file_location("error_codes_under_test", ERROR_CODES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_names_every_error() -> None:
    assert set(all_errors()) == set(EXPECTED)


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_every_error_is_the_same_on_both_sides(error_codes: Any, kind: type[WavetrainError]) -> None:
    code, triton_code, client_class = EXPECTED[kind]
    assert kind.code is code
    response = error_codes.error_response(kind("say what to do"))
    assert (response.error.message, response.error.code) == (f"{code.value}: say what to do", triton_code)
    received = client_errors.error_from_message(response.error.message)
    assert type(received) is client_class
    assert (str(received), received.word) == ("say what to do", code.value)


def test_both_sides_know_the_same_words(error_codes: Any) -> None:
    words = {code.value for code in ErrorCode}
    assert set(client_errors.ERROR_CLASSES) == words
    assert {error_codes.triton_error(code, "").code for code in ErrorCode} <= set(TRITON_CODES)
    assert {kind.default_word for kind in client_errors.ClientError.__subclasses__()} <= words


def test_a_message_is_one_line_of_bounded_length(error_codes: Any) -> None:
    assert error_codes.error_message(ErrorCode.INVALID, "first\n  second\tthird") == "invalid: first second third"
    assert len(error_codes.error_message(ErrorCode.INVALID, "x" * 10_000)) < 600


def test_a_bug_shows_nothing_of_itself(error_codes: Any) -> None:
    response = error_codes.error_response(KeyError("/secret/path"))
    assert response.error.code == "INTERNAL"
    assert response.error.message.startswith("internal: ")
    assert "secret" not in response.error.message


@pytest.mark.parametrize("kind", [WavetrainError, *EXPECTED], ids=lambda kind: kind.__name__)
def test_an_error_says_when_it_is_raised(kind: type[WavetrainError]) -> None:
    assert kind.__doc__
    assert str(kind("message")) == "message"
