# SPDX-License-Identifier: Apache-2.0
"""How many retries there may be: a share of the requests, so that retries cannot multiply an overload.

The idea and the numbers' kinds are Finagle's RetryBudget: every request deposits a fraction of a retry, a retry
withdraws one, deposits are forgotten after a while, and a few retries a second are free, for when there is little
traffic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class RetryBudget:
    """Counts requests and retries of the last `window_s` seconds.

    Args:
        ratio: retries per request.
        free_per_s: retries that need no requests.
        window_s: how long a request counts.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        free_per_s: float = 1.0,
        window_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ratio = ratio
        self._num_free = free_per_s * window_s
        self._clock = clock
        # Ten slots a window: (when it began, requests, retries).
        self._slot_s = window_s / 10
        self._slots: deque[list[float]] = deque(maxlen=11)
        self._window_s = window_s

    def deposit(self) -> None:
        """A request came in."""
        self._slot()[1] += 1

    def withdraw(self) -> bool:
        """Takes a retry; False where there is none left."""
        slot = self._slot()
        oldest_s = self._clock() - self._window_s
        live = [item for item in self._slots if item[0] > oldest_s]
        requests, retries = sum(item[1] for item in live), sum(item[2] for item in live)
        if retries + 1 > self._num_free + self._ratio * requests:
            return False
        slot[2] += 1
        return True

    def _slot(self) -> list[float]:
        now_s = self._clock()
        if not self._slots or now_s - self._slots[-1][0] >= self._slot_s:
            self._slots.append([now_s, 0, 0])
        return self._slots[-1]
