# SPDX-License-Identifier: Apache-2.0
"""The sender thread: news are written and sent here, off the thread that hears from the core.

Sending is mostly the interpreter's work, which threads cannot share: four of them cost as much per response as one,
and sent no more (measured). One also keeps each request's responses in order.
"""

from __future__ import annotations

import logging
import threading
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
    """Sends the news of requests, at the pace that its budget allows."""

    def __init__(self, budget_cores: float, on_pause: Callable[[float], None] | None = None) -> None:
        """`on_pause`: told the moment until which nothing but the urgent will be sent, where it is worth knowing."""
        self._on_pause = on_pause
        self._pace = SendPace(budget_cores)
        self._outbox: Outbox[LiveRequest] = Outbox(self._pace)
        self._wakeup = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def schedule(self, live: LiveRequest, haste: Haste) -> None:
        """Has a request looked at or flushed. May be called by any thread."""
        if self._outbox.put(live, haste):
            self._wakeup.set()

    def close(self, timeout_s: float) -> None:
        """Sends what is due and ends the thread. Idempotent."""
        self._is_closing = True
        self._wakeup.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_closing:
            self._wakeup.wait(self._outbox.wait_s())
            self._wakeup.clear()
            self._deal(*self._outbox.take())
        self._deal(*self._outbox.take())

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
