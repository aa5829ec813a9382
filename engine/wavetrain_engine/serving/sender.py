# SPDX-License-Identifier: Apache-2.0
"""Sending: the news of requests are written and sent on the thread that hears them from the core.

Sending is mostly the interpreter's work, which threads cannot share: four of them cost as much per response as one,
and sent no more (measured). One keeps each request's responses in order; that it is the one which hears saves an idle
machine a wake-up per response. The core waits for nobody, so a burst holds up nothing but the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.serving.live_request import LiveRequest
from wavetrain_engine.serving.outbox import Haste, Outbox
from wavetrain_engine.serving.send_pace import SendPace

_LOGGER = logging.getLogger(__name__)
# Shorter pauses are not worth telling: a step takes about as long.
_MIN_TOLD_PAUSE_S = 0.02


class Sender:
    """Sends the news of requests, at the pace that its budget allows. Used by one thread."""

    def __init__(self, budget_cores: float, on_pause: Callable[[float], None] | None = None) -> None:
        """`on_pause`: told the moment until which nothing but the urgent will be sent, where it is worth knowing."""
        self._on_pause = on_pause
        self._pace = SendPace(budget_cores)
        self._outbox: Outbox[LiveRequest] = Outbox(self._pace)

    def schedule(self, live: LiveRequest, haste: Haste) -> None:
        """Has a request looked at or flushed by a later `send_due`."""
        self._outbox.put(live, haste)

    def send_due(self) -> float | None:
        """Sends what is due. Returns after how long there will be more; None: when there is news."""
        while (wait_s := self._outbox.wait_s()) == 0.0:
            self._deal(*self._outbox.take())
        return wait_s

    def _deal(self, look: Sequence[LiveRequest], due: Sequence[LiveRequest]) -> None:
        for live in look:
            _attempt(live, live.look)
        if not due:
            return
        started_s = time.thread_time()
        num_responses = sum(_attempt(live, live.flush) for live in due)
        now_s = time.monotonic()
        self._pace.charge(now_s, num_responses, time.thread_time() - started_s)
        pause_s = self._pace.wait_s(now_s)
        if self._on_pause is not None and pause_s > _MIN_TOLD_PAUSE_S:
            self._on_pause(now_s + pause_s)


def _attempt(live: LiveRequest, work: Callable[[], int]) -> int:
    try:
        return work()
    except Exception:  # one request's bug must not end the thread that serves the others
        _LOGGER.exception("a response could not be made")
        _fail(live)
        return 0


def _fail(live: LiveRequest) -> None:
    try:
        live.fail(ErrorCode.INTERNAL, "the server failed on this request; its log says why")
    except Exception:  # the server has dropped the request: there is nobody to tell
        _LOGGER.exception("an error could not be sent")
