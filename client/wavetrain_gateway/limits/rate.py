# SPDX-License-Identifier: Apache-2.0
"""How much of a limit is left, and when there is more."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of one limit.

    Attributes:
        limit: per minute.
        remaining: what could be taken now.
        reset_s: seconds until all of it is there again, if nothing is taken.
    """

    limit: int
    remaining: int
    reset_s: float


def sliding_wait_s(window: tuple[int, float, int, float], window_s: float, room: int) -> float:
    """Seconds until a sliding window counter holds no more than `room`, if nothing is added to it.

    Args:
        window: hits of the window before, for how long they count, hits of the current one, for how long they count.
        window_s: a window's length.
        room: what may be counted; 0 or more.
    """
    previous, previous_s, current, current_s = window
    until_shift_s = max(0.0, current_s - window_s)
    # The counter rounds the weighted part down: it fits as soon as that is less than the next whole number.
    if current <= room:
        if math.floor(previous * previous_s / window_s) + current <= room:
            return 0.0
        wait_s = previous_s - (room - current + 1) * window_s / previous
        if wait_s <= until_shift_s:
            return max(0.0, wait_s)
        return until_shift_s
    return until_shift_s + max(0.0, window_s - (room + 1) * window_s / current)


def as_duration(seconds: float) -> str:
    """A span as OpenAI's x-ratelimit-reset-* headers have it: `850ms`, `12s`, `6m0s`. Rounded up."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
