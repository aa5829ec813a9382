# SPDX-License-Identifier: Apache-2.0
"""What the limits ask of a storage: the `limits` library's two kinds of window, and refunds."""

from __future__ import annotations

from typing import Protocol


class RefundingStorage(Protocol):
    """A storage of the `limits` library with moving windows and sliding window counters that can take hits back."""

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts hits in a moving window, if they are allowed."""
        ...

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """Returns when the oldest hit of the window was, by the storage's clock, and how many there are."""
        ...

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts a hit of this weight, if it is allowed."""
        ...

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Returns the hits of the window before, for how long they count, and the same of the current window."""
        ...

    async def refund_sliding_window_entry(self, key: str, expiry: int, amount: int, *, is_shifted: bool) -> None:
        """Takes back a part of a hit; `is_shifted`: its window has become the one before."""
        ...
