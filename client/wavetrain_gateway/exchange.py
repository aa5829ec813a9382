# SPDX-License-Identifier: Apache-2.0
"""One HTTP request and its answer: headers, ids, errors as OpenAI has them, and what the log will say of it."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from wavetrain_gateway.admission import Caller
from wavetrain_gateway.errors import GatewayError, InvalidRequest
from wavetrain_gateway.feed import FeedStats

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_TIMEOUT_MS = 86_400_000


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of a request, for metrics and the access log. No text of a prompt or an answer."""

    route: str = "unknown"
    model: str = ""
    status: int = 0
    error_code: str = ""
    is_streamed: bool = False
    is_from_cache: bool = False
    finish_reasons: list[str] = field(default_factory=list[str])
    stats: FeedStats | None = None


class Exchange:
    """A request to be answered once.

    Attributes:
        headers: the request's, names in lower case; of repeated ones the last.
        request_id: as in the answer's x-request-id: the caller's own, or a new one.
        extra_headers: go with the answer, x-ratelimit-* and the like.
        span: of the tracer's own; None where nothing is traced, or not yet.
    """

    def __init__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.headers: Mapping[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.request_id = uuid.uuid4().hex
        self.caller = Caller()
        self.extra_headers: dict[str, str] = {}
        self.record = Record()
        self.span: Any = None
        self.started_s = time.monotonic()
        self.has_started = False

    @property
    def path(self) -> str:
        """The path that was asked for, as the server parsed it; never taken from the Host header."""
        return str(self.scope["path"])

    @property
    def client_host(self) -> str:
        """The peer's address."""
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    @property
    def traceparent(self) -> str | None:
        """The caller's trace, as W3C's header has it; None without one, or with two, which name no trace."""
        given = [value for name, value in self.scope["headers"] if name == b"traceparent"]
        return given[0].decode("latin-1") if len(given) == 1 else None

    @property
    def elapsed_s(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.started_s

    def take_request_id(self) -> None:
        """Takes the caller's own x-request-id, if there is one.

        Raises:
            InvalidRequest: it is none that can be taken.
        """
        given = self.headers.get("x-request-id")
        if given is None:
            return
        if _REQUEST_ID.fullmatch(given) is None:
            raise InvalidRequest("x-request-id must be 1 to 128 letters, digits and ._:-", param="x-request-id")
        self.request_id = given

    def timeout_s(self, most_s: float) -> float:
        """The time the request may take: `most_s`, or less by x-request-timeout-ms.

        Raises:
            InvalidRequest: the header is no number of milliseconds.
        """
        given = self.headers.get("x-request-timeout-ms")
        if given is None:
            return most_s
        if not (given.isascii() and given.isdigit() and 0 < len(given) <= 9 and 0 < int(given) <= _MAX_TIMEOUT_MS):
            raise InvalidRequest(
                f"x-request-timeout-ms must be a whole number between 1 and {_MAX_TIMEOUT_MS}",
                param="x-request-timeout-ms",
            )
        return min(most_s, int(given) / 1000)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Sends status and headers, with those that every answer has."""
        self.record.status = status
        every = {
            "x-request-id": self.request_id,
            "openai-processing-ms": str(round(self.elapsed_s * 1000)),
            "x-content-type-options": "nosniff",
            **self.extra_headers,
            **headers,
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        self.has_started = True
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Sends a piece of the body; waits while the reader is behind."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def answer(
        self, body: bytes, media: str, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a whole answer."""
        length = {"content-type": media, "content-length": str(len(body))}
        await self.start(status, {**length, **(headers or {})})
        await self.write(body, is_last=True)

    async def answer_json(self, value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Sends a whole answer in JSON."""
        await self.answer(json.dumps(value).encode(), "application/json", status=status, headers=headers)

    async def answer_error(self, error: GatewayError) -> None:
        """Sends what went wrong, unless an answer has begun."""
        self.record.error_code = error.code or error.type
        if not self.has_started:
            await self.answer_json(error.body(self.request_id), status=error.status, headers=error.headers)

    def abort(self) -> None:
        """Drops the connection without sending what waits for a reader that takes nothing."""
        abort = self.scope.get("extensions", {}).get("wavetrain.abort")
        if abort is not None:
            abort()
