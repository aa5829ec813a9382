# SPDX-License-Identifier: Apache-2.0
"""uvicorn's protocols with what it leaves out: bounds on headers, in bytes and in time; dropping a connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from wavetrain_gateway.settings import CapSettings, ListenSettings

_LAST_WORDS_S = 5.0


class _HeadersTooLarge(Exception):
    """More header bytes than are read."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes the objects, so the bounds are the class's: `bounded_protocol` gives it some."""

    caps: ClassVar[CapSettings] = CapSettings()
    listen: ClassVar[ListenSettings] = ListenSettings()
    _num_header_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Waits for headers, not for ever."""
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._got_headers()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begins to count, and gives the application a way to drop the connection."""
        super().on_message_begin()
        self._num_header_bytes = 0
        self.scope["extensions"] = {"wavetrain.abort": self.transport.abort}  # type: ignore[typeddict-item]
        if self._header_timer is None:
            self._wait_for_headers()

    def on_url(self, url: bytes) -> None:
        """Counts."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Waits no more."""
        self._got_headers()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Says in JSON what is wrong with the bytes that came: 431 for too many, 400 for the rest."""
        is_too_large = self._num_header_bytes > self.caps.max_header_bytes
        status = 431 if is_too_large else 400
        text = f"the headers have more than {self.caps.max_header_bytes} bytes" if is_too_large else "no valid HTTP"
        error = {"message": text, "type": "invalid_request_error", "param": None, "code": "bad_http"}
        body = json.dumps({"error": error}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _count(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > self.caps.max_header_bytes:
            raise _HeadersTooLarge

    def _wait_for_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.listen.header_timeout_s, self.transport.close)

    def _got_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class BoundedSocketProtocol(WebSocketsSansIOProtocol):
    """A WebSocket connection that ends, also where the peer takes nothing: uvicorn's own waits for it."""

    async def run_asgi(self) -> None:
        """Serves the connection, and drops it when its last words were not taken."""
        await super().run_asgi()
        self.loop.call_later(_LAST_WORDS_S, self.transport.abort)


def bounded_protocol(caps: CapSettings, listen: ListenSettings) -> type[BoundedProtocol]:
    """The protocol class with these bounds."""
    return type("BoundedProtocol", (BoundedProtocol,), {"caps": caps, "listen": listen})
