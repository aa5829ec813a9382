# SPDX-License-Identifier: Apache-2.0
"""Server-sent events to one reader: comments while it is silent, an end for a reader that takes nothing."""

from __future__ import annotations

import asyncio
from types import TracebackType

from wavetrain_gateway.answers import PING
from wavetrain_gateway.exchange import Exchange

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # or nginx holds events back
}


class ReaderTooSlow(Exception):
    """The reader took nothing for too long; the connection was dropped."""


class EventStream:
    """Writes events. One task writes; a timer looks after it, at no cost for each event."""

    def __init__(self, exchange: Exchange, *, write_timeout_s: float, ping_interval_s: float) -> None:
        self._exchange = exchange
        self._write_timeout_s = write_timeout_s
        self._ping_interval_s = ping_interval_s
        self._loop = asyncio.get_running_loop()
        self._interval_s = min(ping_interval_s, write_timeout_s / 4)
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.Task[object] | None = None
        self._writing_since_s: float | None = None
        self._last_write_s = 0.0
        self._is_too_slow = False
        self._pings: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> EventStream:
        self._writer = asyncio.current_task()
        self._last_write_s = self._loop.time()
        self._timer = self._loop.call_later(self._interval_s, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for ping in self._pings:
            ping.cancel()
        if self._is_too_slow and kind is asyncio.CancelledError:
            # Python 3.11 counts cancels, and this one has reached its end.
            uncancel = getattr(self._writer, "uncancel", None)
            if uncancel is not None:
                uncancel()
            raise ReaderTooSlow from None

    async def start(self, headers: dict[str, str]) -> None:
        """Sends the status and the headers."""
        await self._exchange.start(200, {**_HEADERS, **headers})

    async def write(self, events: bytes, *, is_last: bool = False) -> None:
        """Sends events; waits while the reader is behind.

        Raises:
            ReaderTooSlow: from the `async with` block, when the wait was too long.
        """
        now_s = self._loop.time()
        self._writing_since_s = self._last_write_s = now_s
        await self._exchange.write(events, is_last=is_last)
        self._writing_since_s = None

    def _look(self) -> None:
        now_s = self._loop.time()
        since_s = self._writing_since_s
        if since_s is not None and now_s - since_s >= self._write_timeout_s:
            self._is_too_slow = True
            self._exchange.abort()
            if self._writer is not None:
                self._writer.cancel()
            return
        if since_s is None and self._exchange.has_started and now_s - self._last_write_s >= self._ping_interval_s:
            ping = self._loop.create_task(self.write(PING))
            self._pings.add(ping)
            ping.add_done_callback(self._pings.discard)
        self._timer = self._loop.call_later(self._interval_s, self._look)
