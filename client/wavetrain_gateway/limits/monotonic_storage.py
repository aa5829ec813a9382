# SPDX-License-Identifier: Apache-2.0
"""Windows of the `limits` library in this process's memory, by a monotonic clock.

The library's own memory storage goes by the time of day, which may be set back by an hour, keeps one object per token,
and awaits in the middle of a hit. Here a hit is one step of the event loop, hence exact under any concurrency, and
costs the same whatever its weight.

A sliding window counter is the library's: hits of the window before, weighted by how much of it the last window's
length still covers, and of the current one, which begins with its first hit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage

# How many hits pass between two searches for windows that nobody needs any more.
_HITS_PER_SWEEP = 4096


@dataclass(slots=True)
class _Counter:
    """Two adjacent windows of one key; `start_s` is the current one's."""

    start_s: float
    window_s: float
    current: int = 0
    previous: int = 0

    def advance(self, now_s: float) -> None:
        age_s = now_s - self.start_s
        if age_s >= 2 * self.window_s:
            self.start_s, self.current, self.previous = now_s, 0, 0
        elif age_s >= self.window_s:
            self.start_s, self.current, self.previous = self.start_s + self.window_s, 0, self.current

    def previous_expires_in_s(self, now_s: float) -> float:
        return self.window_s - (now_s - self.start_s) if self.previous else 0.0

    def weighted(self, now_s: float) -> int:
        return int(self.previous * self.previous_expires_in_s(now_s) / self.window_s) + self.current


@dataclass(slots=True)
class _Moments:
    """When the newest hits of one key were, oldest first."""

    window_s: float
    at_s: deque[float] = field(default_factory=deque[float])

    def forget(self, now_s: float) -> None:
        while self.at_s and self.at_s[0] <= now_s - self.window_s:
            self.at_s.popleft()


@dataclass(slots=True)
class _Fixed:
    """Hits of one key in a window that does not move."""

    count: int
    expires_s: float


class MonotonicStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """A storage of the `limits` library. Times that it returns are of its clock.

    Args:
        clock: seconds, never going back.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counters: dict[str, _Counter] = {}
        self._moments: dict[str, _Moments] = {}
        self._fixed: dict[str, _Fixed] = {}
        self._hits_to_sweep = _HITS_PER_SWEEP

    @property
    def base_exceptions(self) -> type[Exception]:
        """What the library counts as a failure of the storage."""
        return OSError

    def __len__(self) -> int:
        return len(self._counters) + len(self._moments) + len(self._fixed)

    # Moving window: no more than `limit` hits in any span of `expiry` seconds.

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts `amount` hits, if they are allowed."""
        if amount > limit:
            return False
        now_s = self._sweep()
        moments = self._moments.setdefault(key, _Moments(expiry))
        moments.forget(now_s)
        if len(moments.at_s) + amount > limit:
            return False
        moments.at_s.extend([now_s] * amount)
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """Returns when the oldest hit of the window was, and how many there are."""
        now_s = self._clock()
        moments = self._moments.get(key)
        if moments is None:
            return now_s, 0
        moments.forget(now_s)
        return (moments.at_s[0] if moments.at_s else now_s), len(moments.at_s)

    # Sliding window counter.

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts a hit of this weight, if it is allowed."""
        if amount > limit:
            return False
        now_s = self._sweep()
        counter = self._counter(key, expiry, now_s)
        if counter.weighted(now_s) + amount > limit:
            return False
        counter.current += amount
        return True

    async def refund_sliding_window_entry(self, key: str, expiry: int, amount: int, *, is_shifted: bool) -> None:
        """Takes back a part of a hit: from the window before where `is_shifted`, else from the current one.

        What is no longer counted there is not taken back from elsewhere.
        """
        counter = self._counter(key, expiry, self._clock())
        if is_shifted:
            counter.previous -= min(amount, counter.previous)
        else:
            counter.current -= min(amount, counter.current)

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Returns the hits of the window before, for how long they count, and the same of the current window."""
        now_s = self._clock()
        counter = self._counters.get(key)
        if counter is None:
            return 0, 0.0, 0, 2.0 * expiry
        counter.advance(now_s)
        current_expires_in_s = 2 * expiry - (now_s - counter.start_s)
        return counter.previous, counter.previous_expires_in_s(now_s), counter.current, current_expires_in_s

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Forgets the hits of a key."""
        self._counters.pop(key, None)

    # Fixed window, which every storage has.

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Counts a hit of this weight; returns the window's sum."""
        now_s = self._sweep()
        window = self._fixed.get(key)
        if window is None or window.expires_s <= now_s:
            window = self._fixed[key] = _Fixed(0, now_s + expiry)
        window.count += amount
        return window.count

    async def get(self, key: str) -> int:
        """Returns the window's sum."""
        window = self._fixed.get(key)
        return window.count if window is not None and window.expires_s > self._clock() else 0

    async def get_expiry(self, key: str) -> float:
        """Returns when the window ends."""
        window = self._fixed.get(key)
        return window.expires_s if window is not None else self._clock()

    async def check(self) -> bool:
        """Memory is always there."""
        return True

    async def reset(self) -> int:
        """Forgets everything; returns how many windows that were."""
        num_windows = len(self)
        self._counters.clear()
        self._moments.clear()
        self._fixed.clear()
        return num_windows

    async def clear(self, key: str) -> None:
        """Forgets a key."""
        self._moments.pop(key, None)
        self._fixed.pop(key, None)

    def _counter(self, key: str, window_s: float, now_s: float) -> _Counter:
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = _Counter(now_s, window_s)
        counter.advance(now_s)
        return counter

    def _sweep(self) -> float:
        """Now and then drops the windows that hold nothing; returns the time."""
        now_s = self._clock()
        self._hits_to_sweep -= 1
        if self._hits_to_sweep <= 0:
            self._hits_to_sweep = _HITS_PER_SWEEP
            self._counters = {k: c for k, c in self._counters.items() if now_s - c.start_s < 2 * c.window_s}
            self._moments = {k: m for k, m in self._moments.items() if m.at_s and m.at_s[-1] > now_s - m.window_s}
            self._fixed = {k: w for k, w in self._fixed.items() if w.expires_s > now_s}
        return now_s
