# SPDX-License-Identifier: Apache-2.0
"""The sender threads: news are written and sent here, off the thread that hears from the core.

Sending costs 60 to 100 µs, most of it waiting for the server, so a few threads share it. A request stays on one
of them. At low load nothing waits: a request with news is sent as soon as its thread is free, and only what
arrives meanwhile is merged.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading

from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.serving.live_request import LiveRequest

_LOGGER = logging.getLogger(__name__)
_NUM_THREADS = 4


class SenderPool:
    """Flushes requests, each always on the same thread."""

    def __init__(self, num_threads: int = _NUM_THREADS) -> None:
        self._queues: list[queue.SimpleQueue[LiveRequest | None]] = [queue.SimpleQueue() for _ in range(num_threads)]
        self._turn = itertools.count()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"sender-{index}", daemon=True)
            for index, work in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def pick(self) -> queue.SimpleQueue[LiveRequest | None]:
        """The queue of the thread that a new request is to stay on; putting the request there has it flushed."""
        return self._queues[next(self._turn) % len(self._queues)]

    def close(self, timeout_s: float) -> None:
        """Sends what has been scheduled and ends the threads. Idempotent."""
        for work in self._queues:
            work.put(None)
        for thread in self._threads:
            thread.join(timeout_s / len(self._threads))

    def _run(self, work: queue.SimpleQueue[LiveRequest | None]) -> None:
        while (live := work.get()) is not None:
            _flush(live)
            del live  # a thread that waits must not keep an ended request alive


def _flush(live: LiveRequest) -> None:
    try:
        live.flush()
    except Exception:  # one request's bug must not end the thread that serves the others
        _LOGGER.exception("a response could not be made")
        _fail(live)


def _fail(live: LiveRequest) -> None:
    try:
        live.fail(ErrorCode.INTERNAL, "the server failed on this request; its log says why")
    except Exception:  # the server has dropped the request: there is nobody to tell
        _LOGGER.exception("an error could not be sent")
