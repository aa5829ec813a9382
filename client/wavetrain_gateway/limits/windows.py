# SPDX-License-Identifier: Apache-2.0
"""Requests and tokens per minute of the keys, on one storage: strategies of the `limits` library.

Requests go by a moving window: in no span of 60 s are more than the limit let in. Tokens go by a sliding window
counter, which costs the same whatever a request weighs: a request reserves what it may use, and gives back what it
did not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from limits import RateLimitItemPerMinute
from limits.aio.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from wavetrain_gateway.limits.rate import Allowance, sliding_wait_s
from wavetrain_gateway.limits.storage import RefundingStorage

WINDOW_S = 60
_NO_LIMIT = 2**53  # what Lua still counts exactly


@dataclass(frozen=True, slots=True)
class TokenHold:
    """Tokens that were reserved.

    Attributes:
        shifts_at_s: when the window they were counted in becomes the one before.
        expires_at_s: when they count no more.
    """

    amount: int
    shifts_at_s: float
    expires_at_s: float


class Windows:
    """Counts what keys use.

    Args:
        storage: where the counts are.
        storage_clock: what the storage's moving windows go by.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        storage: RefundingStorage,
        *,
        storage_clock: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._storage_clock = storage_clock or clock
        self._clock = clock
        # The library's annotations ask for a subclass of its Storage.
        self._requests = MovingWindowRateLimiter(cast("Any", storage))
        self._tokens = SlidingWindowCounterRateLimiter(cast("Any", storage))

    async def take_request(self, key_id: str, limit: int) -> bool:
        """Counts a request, if it is allowed."""
        return await self._requests.hit(_item(limit, "requests"), key_id)

    async def requests(self, key_id: str, limit: int) -> Allowance:
        """What is left of the requests. With none left, `reset_s` is when the next one is."""
        key = _item(limit, "requests").key_for(key_id)
        oldest_s, count = await self._storage.get_moving_window(key, limit, WINDOW_S)
        age_s = self._storage_clock() - oldest_s
        reset_s = min(WINDOW_S, max(0.0, WINDOW_S - age_s)) if count else 0.0
        return Allowance(limit, max(0, limit - count), reset_s)

    async def take_tokens(self, key_id: str, limit: int, amount: int) -> TokenHold | None:
        """Reserves tokens; None where that many are not left."""
        item = _item(limit, "tokens")
        if not await self._tokens.hit(item, key_id, cost=amount):
            return None
        window = await self._storage.get_sliding_window(item.key_for(key_id), WINDOW_S)
        now_s = self._clock()
        return TokenHold(amount, now_s + window[3] - WINDOW_S, now_s + window[3])

    async def settle_tokens(self, key_id: str, limit: int, hold: TokenHold, num_used: int) -> None:
        """Counts what was used in place of what was reserved."""
        key = _item(limit, "tokens").key_for(key_id)
        surplus = hold.amount - num_used
        if surplus < 0:
            await self._storage.acquire_sliding_window_entry(key, _NO_LIMIT, WINDOW_S, -surplus)
        elif surplus > 0 and self._clock() < hold.expires_at_s:
            is_shifted = self._clock() >= hold.shifts_at_s
            await self._storage.refund_sliding_window_entry(key, WINDOW_S, surplus, is_shifted=is_shifted)

    async def tokens(self, key_id: str, limit: int) -> Allowance:
        """What is left of the tokens."""
        window = await self._token_window(key_id, limit)
        used = int(window[0] * window[1] / WINDOW_S) + window[2]
        reset_s = sliding_wait_s(window, WINDOW_S, 0) if used else 0.0
        return Allowance(limit, max(0, limit - used), reset_s)

    async def wait_for_tokens_s(self, key_id: str, limit: int, amount: int) -> float:
        """Seconds until that many tokens are left, at most `limit`, if nobody takes any."""
        return sliding_wait_s(await self._token_window(key_id, limit), WINDOW_S, limit - amount)

    async def _token_window(self, key_id: str, limit: int) -> tuple[int, float, int, float]:
        return await self._storage.get_sliding_window(_item(limit, "tokens").key_for(key_id), WINDOW_S)


def _item(limit: int, namespace: str) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(limit, namespace=namespace)
