# SPDX-License-Identifier: Apache-2.0
"""Telling an engine core that hangs from one that works: it is asked now and then, and answers between two steps.

So the time without an answer is the time of a step. A core that hangs but lives (a device that never answers, a
deadlock, a SIGSTOP) would otherwise keep its requests, and every later one, waiting for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# A core that says nothing for this share of the limit is asked, but at the latest after so long.
_ASK_AFTER_SHARE = 0.25
_ASK_AFTER_S = 5.0
# Looked at less often than this, the watching process itself did not run, and its core may not have either.
_MAX_TICK_S = 1.0


class CoreWatchdog:
    """Counts how long a core that was asked has not answered. Its owner looks at it several times a second."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit_s`: how long a step may take; 0: any time, the core is never asked."""
        self.limit_s = limit_s
        self._clock = clock
        self._ask_after_s = min(_ASK_AFTER_S, limit_s * _ASK_AFTER_SHARE)
        self._last_tick_s = clock()
        self._silent_s = 0.0
        self._is_asked = False

    def hear(self) -> None:
        """The core said something: it is between two steps."""
        self._silent_s = 0.0
        self._is_asked = False

    def tick(self) -> None:
        """Counts the time since the last tick."""
        now_s = self._clock()
        self._silent_s += min(_MAX_TICK_S, now_s - self._last_tick_s)
        self._last_tick_s = now_s

    def take_question(self) -> bool:
        """Whether the core is to be asked now; true once for each silence."""
        if self.limit_s == 0 or self._is_asked or self._silent_s < self._ask_after_s:
            return False
        self._silent_s = 0.0
        self._is_asked = True
        return True

    @property
    def is_hung(self) -> bool:
        """Whether the core has not answered for longer than a step may take."""
        return self._is_asked and self._silent_s > self.limit_s
