# SPDX-License-Identifier: Apache-2.0
"""Calls to a shared store that never hold a request up: a store that is slow or gone is left alone until it is back.

The time-out is one of silence, not of a call: a store that answers others is alive, however many wait for it, and 200
requests at once are no outage. It is counted in short waits, each with a turn of the event loop, and not by a clock:
while the loop is busy with other things, answers lie unread, and the store is not to blame.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

SILENCE_TIMEOUT_S = 0.005
_NUM_WAITS = 8  # an answer passes several turns of the loop on its way from the socket to its caller
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
    ) -> None:
        self.num_failures = 0
        self._ping = ping
        self._disconnect = disconnect
        self._failures = (*failures, OSError, asyncio.TimeoutError)
        self._what = what
        self._timeout_s = timeout_s
        self._probe_period_s = probe_period_s
        self._num_answers = 0
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
        task = asyncio.ensure_future(ask())
        wait_s = self._timeout_s / _NUM_WAITS
        num_silent, num_answers = 0, self._num_answers
        try:
            while num_silent < _NUM_WAITS and not task.done():
                await asyncio.wait({task}, timeout=wait_s)
                num_silent = num_silent + 1 if num_answers == self._num_answers else 0
                num_answers = self._num_answers
            if not task.done():
                raise asyncio.TimeoutError(f"no answer for {self._timeout_s * 1000:.0f} ms")
            answer = task.result()
            self._num_answers += 1
            return answer
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
        self._is_down = False
        self._probe = None
        _log.warning("%s answers again", self._what)


def _forget(task: asyncio.Future[T]) -> None:
    if not task.cancelled():
        task.exception()
