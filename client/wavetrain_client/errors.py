# SPDX-License-Identifier: Apache-2.0
"""Every error the client raises on purpose, as one tree, and the one place that reads the wire's error words.

    ClientError
    ├── ConnectionFailed      no server answered; nothing was generated
    ├── RequestRejected       the request is wrong, or names something that is not there
    ├── ServerBusy            the server is full; the same request may succeed later
    ├── Cancelled             the request was cancelled on the server
    ├── DeadlineExceeded      the request's own time limit passed
    ├── StreamBroken          the stream ended in the middle; what arrived is good, the rest is lost
    └── ServerFailed          the server could not finish the request

A stream of the Triton server carries an error as a bare message without a status, so the server starts each message
with a stable word (`invalid: `, `busy: `, ...). `str(error)` is the message without it; `error.word` is the word.
"""

from __future__ import annotations

import re
from typing import ClassVar


class ClientError(Exception):
    """Root of the tree. `str(error)` says what was wrong and what to do.

    Attributes:
        word: the message's first word on the wire, or the nearest one where the client itself found the error.
    """

    default_word: ClassVar[str] = "internal"

    def __init__(self, message: str, *, word: str | None = None) -> None:
        super().__init__(message)
        self.word = word if word is not None else self.default_word


class ConnectionFailed(ClientError):
    """No server answered at the address, or the connection was lost before the first response."""

    default_word = "dead"


class RequestRejected(ClientError):
    """The request would be refused again: a bad parameter (`invalid`), or an unknown model or adapter (`not_found`)."""

    default_word = "invalid"


class ServerBusy(ClientError):
    """The server's queue is full; wait and send the request again."""

    default_word = "busy"


class Cancelled(ClientError):
    """The request was cancelled on the server, by a stop request or by its shutdown."""

    default_word = "cancelled"


class DeadlineExceeded(ClientError):
    """The request was not finished within its timeout_s."""

    default_word = "deadline"


class StreamBroken(ClientError):
    """The stream broke after the first response, so the request cannot be repeated unnoticed."""

    default_word = "dead"


class ServerFailed(ClientError):
    """The engine died (`dead`) or could not finish this request (`internal`)."""

    default_word = "internal"


ERROR_CLASSES: dict[str, type[ClientError]] = {
    "invalid": RequestRejected,
    "not_found": RequestRejected,
    "busy": ServerBusy,
    "cancelled": Cancelled,
    "deadline": DeadlineExceeded,
    "dead": ServerFailed,
    "internal": ServerFailed,
}

# What the Triton server itself says before a model sees the request: it knows nothing of our words.
_TRITON_PHRASES: tuple[tuple[str, str], ...] = (
    ("is not found", "not_found"),
    ("is not ready", "busy"),
    ("has no available versions", "busy"),
    ("Exceeds maximum queue size", "busy"),
    ("timeout expired", "deadline"),
    ("cancelled", "cancelled"),
    ("unexpected inference input", "invalid"),
    ("expected number of inputs", "invalid"),
    ("unexpected shape for input", "invalid"),
    ("unexpected inference output", "invalid"),
    ("inference input", "invalid"),
    ("invalid value for", "invalid"),
    ("is not healthy", "dead"),
)

# What gRPC itself says, with status INTERNAL or UNKNOWN, when the other end of a connection dies at the wrong moment.
_LOST_CONNECTION = ("Internal error from Core", "RST_STREAM", "Stream removed", "Socket closed", "GOAWAY")

# The Triton server puts these in front of a model's message, in an ensemble and where it refuses a request itself.
_PREFIX = re.compile(r"^(?:\[request id: [^\]]*\] |in ensemble '[^']*', )+")
_WORD = re.compile(r"^([a-z_]+): ?(.*)$", re.DOTALL)


def error_from_message(message: str) -> ClientError:
    """Builds the error for a message of the wire: its first word decides the class.

    A message without a known word comes from the Triton server itself or from a foreign model; its phrase decides,
    and ServerFailed stands for the rest.
    """
    text = _PREFIX.sub("", message)
    match = _WORD.match(text)
    if match is not None and match.group(1) in ERROR_CLASSES:
        word = match.group(1)
        return ERROR_CLASSES[word](match.group(2), word=word)
    for phrase, word in _TRITON_PHRASES:
        if phrase in text:
            return ERROR_CLASSES[word](text, word=word)
    return ServerFailed(text)


def error_from_status(code: str, details: str, *, url: str, has_started: bool) -> ClientError:
    """Builds the error for a failed RPC.

    Args:
        code: the gRPC status code's name, "UNAVAILABLE".
        details: the status message; it starts with one of our words where a model made it.
        url: the server's address, for the message.
        has_started: True when a response of this request had already arrived.
    """
    match = _WORD.match(_PREFIX.sub("", details))
    if match is not None and match.group(1) in ERROR_CLASSES:
        return error_from_message(details)
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded("the request was not finished within its timeout_s; give it more time, or ask for less")
    if has_started:
        return StreamBroken(f"the stream from {url} broke before the request was finished ({code.lower()}: {details})")
    if code == "UNAVAILABLE" or (code in {"INTERNAL", "UNKNOWN"} and any(word in details for word in _LOST_CONNECTION)):
        return ConnectionFailed(
            f"no Triton server answers at {url} ({details}); is it started, and is this its gRPC port?"
        )
    if code == "CANCELLED":
        return Cancelled(details)
    if code == "UNIMPLEMENTED":
        return ConnectionFailed(f"{url} answers, but is no Triton server's gRPC port ({details})")
    if code in {"INVALID_ARGUMENT", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"}:
        return RequestRejected(details)
    if code == "NOT_FOUND":
        return RequestRejected(details, word="not_found")
    return error_from_message(details)
