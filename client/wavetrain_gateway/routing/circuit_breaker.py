# SPDX-License-Identifier: Apache-2.0
"""Leaves a replica alone that failed several times in a row, and tries it again with one request at a time.

The pattern is Nygard's (Release It!, ch. 5): closed, open, half-open.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """The breaker of one replica. Whoever sends a request calls `acquire` first, and one of the others at its end.

    Args:
        num_failures: in a row, that open it.
        first_open_s: how long it stays open; each further failure of a trial doubles that, up to `max_open_s`.
        clock: monotonic seconds.
        jitter: a number from [0, 1), so that gateways do not try all at the same time.
    """

    def __init__(
        self,
        *,
        num_failures: int = 5,
        first_open_s: float = 1.0,
        max_open_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._num_failures = num_failures
        self._first_open_s = first_open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._jitter = jitter
        self._failed_in_row = 0
        self._times_opened = 0
        self._opens_until_s: float | None = None
        self._has_trial = False

    @property
    def state(self) -> State:
        """Closed: all requests; open: none; half-open: one at a time."""
        if self._opens_until_s is None:
            return "closed"
        return "open" if self._clock() < self._opens_until_s else "half_open"

    def allows(self) -> bool:
        """Whether a request could be sent now."""
        state = self.state
        return state == "closed" or (state == "half_open" and not self._has_trial)

    def acquire(self) -> bool:
        """Whether the request may be sent; in the half-open state it then is the one trial."""
        if not self.allows():
            return False
        if self.state == "half_open":
            self._has_trial = True
        return True

    def succeed(self) -> None:
        """A request was answered."""
        self._failed_in_row = self._times_opened = 0
        self._opens_until_s = None
        self._has_trial = False

    def fail(self) -> None:
        """A request failed for a reason that is the replica's."""
        state = self.state
        self._has_trial = False
        self._failed_in_row += 1
        # What was sent before it opened says nothing new when it fails later.
        if state == "half_open" or (state == "closed" and self._failed_in_row >= self._num_failures):
            open_s = min(self._max_open_s, self._first_open_s * 2.0**self._times_opened)
            self._times_opened = min(self._times_opened + 1, 32)
            self._opens_until_s = self._clock() + open_s * (0.75 + 0.5 * self._jitter())

    def abandon(self) -> None:
        """A request ended without saying anything of the replica: the caller went away."""
        self._has_trial = False
