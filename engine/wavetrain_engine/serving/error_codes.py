# SPDX-License-Identifier: Apache-2.0
"""From our errors to Triton's: the only producer of the words that error messages start with.

A gRPC stream carries a message and no status, so the message's first word is the machine's part of it:
`invalid: max_tokens must be ...`. A client parses it in one file of its own; a contract test ties the two.
"""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import ErrorCode, WavetrainError

_MAX_MESSAGE_CHARS = 500

_TRITON_CODES: dict[ErrorCode, str] = {
    ErrorCode.INVALID: "INVALID_ARG",
    ErrorCode.NOT_FOUND: "NOT_FOUND",
    ErrorCode.BUSY: "UNAVAILABLE",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.DEADLINE: "CANCELLED",
    ErrorCode.DEAD: "UNAVAILABLE",
    ErrorCode.INTERNAL: "INTERNAL",
}


def error_message(code: ErrorCode, message: str) -> str:
    """The message on the wire: the code's word, then one line for the caller."""
    line = " ".join(message.split())
    if len(line) > _MAX_MESSAGE_CHARS:
        line = f"{line[:_MAX_MESSAGE_CHARS]}..."
    return f"{code.value}: {line}"


def triton_error(code: ErrorCode, message: str) -> Any:
    """A pb_utils.TritonError for the caller."""
    triton_code = getattr(pb_utils.TritonError, _TRITON_CODES[code])
    return pb_utils.TritonError(error_message(code, message), triton_code)


def error_response(error: Exception) -> Any:
    """A pb_utils.InferenceResponse that says what went wrong, without a stack or a path.

    What is not one of our errors is our bug: the caller learns only that, the log has the rest.
    """
    if isinstance(error, WavetrainError):
        return pb_utils.InferenceResponse(error=triton_error(error.code, str(error)))
    message = "the server failed on this request; its log says why"
    return pb_utils.InferenceResponse(error=triton_error(ErrorCode.INTERNAL, message))
