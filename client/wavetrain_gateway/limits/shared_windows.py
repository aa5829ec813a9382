# SPDX-License-Identifier: Apache-2.0
"""Windows that gateways share on a store which may go away, with this process's own windows behind them.

What the store lets in is counted here as well, so that a key which has used up its minute there does not begin a new
one when the store goes away. What was let in while it was away is not told to it later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from wavetrain_gateway.errors import Unavailable
from wavetrain_gateway.limits.rate import Allowance
from wavetrain_gateway.limits.store_guard import StoreDown, StoreGuard
from wavetrain_gateway.limits.windows import TokenHold, Windows

T = TypeVar("T")
WhenDown = Literal["open", "closed"]
STORE_IS_DOWN = "the store of the rate limits does not answer; send the request again later"


@dataclass(frozen=True, slots=True)
class GuardedStore:
    """The windows on a store, and who decides whether it is down."""

    windows: Windows
    guard: StoreGuard


@dataclass(frozen=True, slots=True)
class SharedHold:
    """Tokens that were reserved here, and on the store where it answered."""

    local: TokenHold | None
    shared: TokenHold | None


class SharedWindows:
    """Counts on the store while it answers, else here (`open`) or not at all (`closed`).

    Args:
        local: the windows of this process.
        store: the windows on the store; None where all is counted here.
        when_down: `open` lets requests in by this process's counts, `closed` refuses all that have limits.
    """

    def __init__(self, local: Windows, store: GuardedStore | None = None, *, when_down: WhenDown = "open") -> None:
        self._local = local
        self._store = store
        self._when_down: WhenDown = when_down

    async def take_request(self, key_id: str, limit: int) -> bool:
        """Counts a request, if it is allowed.

        Raises:
            Unavailable: the store is down, and the limits are `closed` then.
        """
        if self._store is None:
            return await self._local.take_request(key_id, limit)
        try:
            is_taken = await self._ask(self._store, lambda windows: windows.take_request(key_id, limit))
        except StoreDown:
            self._refuse_if_closed()
            return await self._local.take_request(key_id, limit)
        if is_taken:
            await self._local.take_request(key_id, limit)
        return is_taken

    async def take_tokens(self, key_id: str, limit: int, amount: int) -> SharedHold | None:
        """Reserves tokens; None where that many are not left. Raises as `take_request` does."""
        on_store: TokenHold | None = None
        if self._store is not None:
            try:
                on_store = await self._ask(self._store, lambda windows: windows.take_tokens(key_id, limit, amount))
            except StoreDown:
                self._refuse_if_closed()
            else:
                if on_store is None:
                    return None
        here = await self._local.take_tokens(key_id, limit, amount)
        return None if here is None and on_store is None else SharedHold(here, on_store)

    async def settle_tokens(self, key_id: str, limit: int, hold: SharedHold, num_used: int) -> None:
        """Counts what was used in place of what was reserved, wherever that was."""
        if hold.local is not None:
            await self._local.settle_tokens(key_id, limit, hold.local, num_used)
        on_store = hold.shared
        if self._store is not None and on_store is not None:
            try:
                await self._ask(self._store, lambda windows: windows.settle_tokens(key_id, limit, on_store, num_used))
            except StoreDown:
                return  # the reservation runs out by itself, within two minutes

    async def requests(self, key_id: str, limit: int) -> Allowance:
        """What is left of the requests. With none left, `reset_s` is when the next one is."""
        return await self._look(lambda windows: windows.requests(key_id, limit))

    async def tokens(self, key_id: str, limit: int) -> Allowance:
        """What is left of the tokens."""
        return await self._look(lambda windows: windows.tokens(key_id, limit))

    async def wait_for_tokens_s(self, key_id: str, limit: int, amount: int) -> float:
        """Seconds until that many tokens are left, at most `limit`, if nobody takes any."""
        return await self._look(lambda windows: windows.wait_for_tokens_s(key_id, limit, amount))

    async def _look(self, ask: Callable[[Windows], Awaitable[T]]) -> T:
        if self._store is not None:
            try:
                return await self._ask(self._store, ask)
            except StoreDown:
                pass
        return await ask(self._local)

    @staticmethod
    async def _ask(store: GuardedStore, ask: Callable[[Windows], Awaitable[T]]) -> T:
        return await store.guard.call(lambda: ask(store.windows))

    def _refuse_if_closed(self) -> None:
        if self._when_down == "closed":
            raise Unavailable(STORE_IS_DOWN, code="limits_unavailable")
