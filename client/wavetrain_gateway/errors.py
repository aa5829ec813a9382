# SPDX-License-Identifier: Apache-2.0
"""Every answer that is no success, as one tree, and the one place that turns the client's errors into it.

    GatewayError
    ├── InvalidRequest      400   the request can be mended by its sender; `param` names the field
    ├── Unauthenticated     401
    ├── Forbidden           403
    ├── NotFound            404   an unknown model, route or request
    ├── MethodNotAllowed    405
    ├── RequestTimeout      408   the body did not arrive in time
    ├── Conflict            409   a request id that is in use
    ├── TooLarge            413
    ├── UnsupportedMedia    415
    ├── RateLimited         429   with Retry-After: this caller's limits, or a full engine
    ├── RequestCancelled    499   cancelled by its id; as an HTTP answer only where the connection is still there
    ├── InternalError       500
    ├── UpstreamBroken      502   a replica went away in the middle
    ├── Unavailable         503   with Retry-After: draining, no replica, or too long in a queue
    └── DeadlinePassed      504

Messages are ours. What a backend said is shown only where it is about the caller's own request, and never with a
path, an address or a memory region in it; the rest goes to the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from wavetrain_client import (
    Cancelled,
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerBusy,
    StreamBroken,
)

DEFAULT_RETRY_AFTER_S = 1.0
_MAX_MESSAGE_CHARS = 500


class GatewayError(Exception):
    """Root of the tree: an HTTP status and an OpenAI error object.

    Args:
        message: for the caller: what was wrong and what to do.
        code: OpenAI's machine-readable code, where the class's own is too coarse.
        param: the field of the request that is to blame.
        headers: what goes along, `retry-after` and the like.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code if code is not None else self.default_code
        self.param = param
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON body: OpenAI's error object, and the request's id to ask about."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }


class InvalidRequest(GatewayError):
    """The request is wrong, and would be again."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class Unauthenticated(GatewayError):
    """No key, or none that is known."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    def __init__(self, message: str, **given: Any) -> None:
        super().__init__(message, **given)
        self.headers.setdefault("www-authenticate", "Bearer")


class Forbidden(GatewayError):
    """The key is known and may not do this."""

    status = 403
    type = "permission_error"
    default_code = "forbidden"


class NotFound(GatewayError):
    """There is no such model, route or request."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(GatewayError):
    """The route is there and takes another method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeout(GatewayError):
    """The body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class Conflict(GatewayError):
    """A running request has this id."""

    status = 409
    type = "invalid_request_error"
    default_code = "request_id_in_use"


class TooLarge(GatewayError):
    """The body is larger than the gateway reads."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class UnsupportedMedia(GatewayError):
    """The body is not JSON by its content type, or is encoded."""

    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class _Later(GatewayError):
    """The same request may succeed after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = DEFAULT_RETRY_AFTER_S, **given: Any) -> None:
        super().__init__(message, **given)
        # Whole seconds, rounded up: what a client that waits them finds is surely due.
        self.headers.setdefault("retry-after", str(max(1, -int(-retry_after_s // 1))))


class RateLimited(_Later):
    """The caller's limits, or the engine's queue, are full."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class RequestCancelled(GatewayError):
    """The request was cancelled by its id, or its reader was too slow."""

    status = 499
    type = "cancelled_error"
    default_code = "cancelled"


class InternalError(GatewayError):
    """The engine or the gateway failed on this request."""

    default_code = "internal_error"


class UpstreamBroken(GatewayError):
    """The replica went away after it had begun to answer."""

    status = 502
    default_code = "upstream_reset"


class Unavailable(_Later):
    """Nobody can take the request now."""

    status = 503
    default_code = "unavailable"


class DeadlinePassed(GatewayError):
    """The request was not finished within its time."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


# What no answer may show: paths, addresses of memory, names of shared memory.
_PRIVATE = re.compile(
    r"(?:^|[\s'\"(=])(?:/|[A-Za-z]:\\)[\w.\-]+[/\\]|0x[0-9a-fA-F]{4,}|shm|triton_python_backend|Traceback"
)
_TOO_LONG = re.compile(r"\btokens?\b.*\b(?:max_model_len|shorten|at most|longer than|exceed)|max_model_len")


def from_client_error(error: ClientError) -> GatewayError:
    """The answer for what went wrong behind the gateway. The error's own text is for the log."""
    if isinstance(error, RequestRejected):
        return _rejected(error)
    if isinstance(error, ServerBusy):
        return RateLimited("the engine's queue is full; send the request again later", code="engine_overloaded")
    if isinstance(error, Cancelled):
        return RequestCancelled("the request was cancelled")
    if isinstance(error, DeadlineExceeded):
        return DeadlinePassed("the request was not finished within its time; ask for less, or allow more time")
    if isinstance(error, ConnectionFailed):
        return Unavailable("no replica of the model answers; send the request again later", code="no_replica")
    if isinstance(error, StreamBroken):
        return UpstreamBroken("the replica went away before the request was finished; what arrived is good")
    if error.word == "dead":
        return Unavailable("the model's engine is starting again; send the request again later", code="engine_dead")
    return InternalError("the engine failed on this request; its log says why")


def _rejected(error: RequestRejected) -> GatewayError:
    message = safe_message(str(error))
    if error.word == "not_found":
        return NotFound(message or "the model is not there", code="model_not_found", param="model")
    if _TOO_LONG.search(str(error)):
        return InvalidRequest(message or "the prompt is too long", code="context_length_exceeded", param="prompt")
    return InvalidRequest(message or "the engine refuses the request; its log says why")


def safe_message(text: str) -> str:
    """The text on one line, cut to a length; empty where it shows what is nobody's business outside."""
    line = " ".join(text.split())[:_MAX_MESSAGE_CHARS]
    return "" if _PRIVATE.search(line) else line
