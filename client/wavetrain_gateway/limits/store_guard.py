# SPDX-License-Identifier: Apache-2.0
"""Calls to a shared store that never hold a request up: a store that is slow or gone is left alone until it is back.

The time-out is one of silence, not of a call: a store that answers others is alive, however many wait for it, and 200
requests at once are no outage. It runs in two halves, with a turn of the event loop between them, so that answers
that lie unread because the loop was busy are read before the store is blamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

SILENCE_TIMEOUT_S = 0.005
PROBE_PERIOD_S = 0.5
PROBE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


class StoreDown(Exception):
    """The store does not answer; what was asked may or may not have been done."""


class StoreGuard:
    """Stands between callers and a store that may fail.

    Args:
        ping: asks the store for a sign of life; raises where it gives none.
        failures: what the store's calls raise when it is gone.
        disconnect: ends the connections to the store.
        what: the store's name, for the log.
        timeout_s: how long the store may be silent.
        probe_period_s: how often a store that is down is asked whether it is back.
        clock: monotonic seconds.

    Attributes:
        num_failures: how often it was found down.
    """

    def __init__(
        self,
        ping: Callable[[], Awaitable[None]],
        failures: tuple[type[BaseException], ...],
        disconnect: Callable[[], Awaitable[None]],
        *,
        what: str = "Redis",
        timeout_s: float = SILENCE_TIMEOUT_S,
        probe_period_s: float = PROBE_PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_failures = 0
        self._ping = ping
        self._disconnect = disconnect
        self._failures = (*failures, OSError, asyncio.TimeoutError)
        self._what = what
        self._timeout_s = timeout_s
        self._probe_period_s = probe_period_s
        self._clock = clock
        self._last_answer_s = clock()
        self._is_down = False
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_down(self) -> bool:
        """Whether calls are refused without being tried."""
        return self._is_down

    async def start(self) -> None:
        """Connects; a store that is not there is down, and asked for until it comes."""
        try:
            await asyncio.wait_for(self._ping(), PROBE_TIMEOUT_S)
        except self._failures as error:
            self._fail(error)

    async def close(self) -> None:
        """Stops asking, and disconnects. Idempotent."""
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await probe
        await self._disconnect()

    async def call(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks the store.

        Raises:
            StoreDown: it is down, or was found to be.
        """
        if self._is_down:
            raise StoreDown
        asked_s = self._clock()
        task = asyncio.ensure_future(ask())
        try:
            is_suspect = False
            while not task.done():
                silent_s = self._clock() - max(asked_s, self._last_answer_s)
                if silent_s >= self._timeout_s and is_suspect:
                    break
                is_suspect = silent_s >= self._timeout_s / 2
                await asyncio.wait({task}, timeout=self._timeout_s / 2)
            if task.done():
                answer = task.result()
                self._last_answer_s = self._clock()
                return answer
            raise asyncio.TimeoutError(f"no answer for {self._timeout_s * 1000:.0f} ms")
        except self._failures as error:
            self._fail(error)
            raise StoreDown from None
        finally:
            if not task.done():
                task.cancel()
                # Its end, when it comes, concerns nobody.
                task.add_done_callback(_forget)

    def _fail(self, error: BaseException) -> None:
        if self._is_down:
            return
        self._is_down = True
        self.num_failures += 1
        _log.error("%s does not answer and is not asked for now: %s", self._what, error)
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_task(self._wait_until_back(), name="store-probe")

    async def _wait_until_back(self) -> None:
        while True:
            await asyncio.sleep(self._probe_period_s)
            try:
                await asyncio.wait_for(self._ping(), PROBE_TIMEOUT_S)
            except self._failures:
                continue
            break
        self._last_answer_s = self._clock()
        self._is_down = False
        self._probe = None
        _log.warning("%s answers again", self._what)


def _forget(task: asyncio.Future[T]) -> None:
    if not task.cancelled():
        task.exception()
