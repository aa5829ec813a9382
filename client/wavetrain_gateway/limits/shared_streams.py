# SPDX-License-Identifier: Apache-2.0
"""How many sequences of a key run at once: in this process, or over all gateways that share a store.

What this gateway runs is counted here in any case, so the limit holds for it while the store is away. Leases of what
it let in then are told to the store by the first renewal after that.

Invariants:
    1. a lease is renewed only while its request runs: giving back waits for a renewal on its way, so nothing that was
       given back counts again
    2. a lease that nobody gave back, as its gateway died or the store was away, expires
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from wavetrain_gateway.errors import Unavailable
from wavetrain_gateway.limits.shared_windows import STORE_IS_DOWN, WhenDown
from wavetrain_gateway.limits.store_guard import StoreDown, StoreGuard
from wavetrain_gateway.limits.stream_leases import LEASE_S, StreamLeases
from wavetrain_gateway.limits.stream_slots import StreamSlots

# Two renewals may fail before a lease expires.
RENEW_PERIOD_S = LEASE_S / 3


class StreamsFull(Exception):
    """The key runs as many sequences as it may; `num_running` of them."""

    def __init__(self, num_running: int) -> None:
        super().__init__(f"{num_running} sequences are running")
        self.num_running = num_running


@dataclass(frozen=True, slots=True)
class GuardedLeases:
    """The leases on a store, and who decides whether it is down."""

    leases: StreamLeases
    guard: StoreGuard


@dataclass(frozen=True, slots=True)
class StreamHold:
    """Sequences that were let in; `lease` is "" where they are counted here alone."""

    key_id: str
    count: int
    lease: str


class SharedStreams:
    """Counts on the store while it answers, else here (`open`) or not at all (`closed`).

    Args:
        store: where gateways count together; None where this one counts alone.
        when_down: `open` lets requests in by this process's count, `closed` refuses all that have a limit.
        renew_period_s: well below a lease's life.
    """

    def __init__(
        self,
        store: GuardedLeases | None = None,
        *,
        when_down: WhenDown = "open",
        renew_period_s: float = RENEW_PERIOD_S,
    ) -> None:
        self._store = store
        self._when_down: WhenDown = when_down
        self._renew_period_s = renew_period_s
        self._slots = StreamSlots()
        self._leases: dict[str, dict[str, int]] = {}
        self._gateway = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._renewing_lock = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None
        self._withdrawing: set[asyncio.Task[None]] = set()

    def running(self, key_id: str) -> int:
        """How many this gateway runs now."""
        return self._slots.running(key_id)

    def start(self) -> None:
        """Begins to renew leases, in a task of the running loop."""
        if self._store is not None and self._renewing is None:
            self._renewing = asyncio.get_running_loop().create_task(self._renew(self._store), name="renew-leases")

    async def close(self) -> None:
        """Stops. What still runs expires on the store. Idempotent."""
        task, self._renewing = self._renewing, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        if self._withdrawing:
            await asyncio.wait(self._withdrawing)

    async def take(self, key_id: str, limit: int | None, count: int) -> StreamHold:
        """Lets `count` more run.

        Raises:
            StreamsFull: they would be more than `limit`.
            Unavailable: the store is down, and the limits are `closed` then.
        """
        if self._store is None or limit is None:
            self._take_here(key_id, limit, count)
            return StreamHold(key_id, count, "")
        store, lease = self._store, f"{self._gateway}-{next(self._numbers)}"
        try:
            is_taken, num_running = await store.guard.call(lambda: store.leases.take(key_id, limit, lease, count))
        except StoreDown:
            if self._when_down == "closed":
                raise Unavailable(STORE_IS_DOWN, code="limits_unavailable") from None
            self._take_here(key_id, limit, count)
        except asyncio.CancelledError:  # it may have been taken all the same
            self._in_background(self._withdraw(store, key_id, lease, count))
            raise
        else:
            if not is_taken:
                raise StreamsFull(num_running)
            self._take_here(key_id, None, count)
        self._leases.setdefault(key_id, {})[lease] = count
        return StreamHold(key_id, count, lease)

    async def give_back(self, hold: StreamHold) -> None:
        """Counts a hold no more: here at once, on the store when it has answered."""
        self._slots.give_back(hold.key_id, hold.count)
        if not hold.lease or self._store is None:
            return
        leases = self._leases[hold.key_id]
        del leases[hold.lease]
        if not leases:
            del self._leases[hold.key_id]
        await self._withdraw(self._store, hold.key_id, hold.lease, hold.count)

    def _take_here(self, key_id: str, limit: int | None, count: int) -> None:
        if not self._slots.take(key_id, limit, count):
            raise StreamsFull(self._slots.running(key_id))

    async def _withdraw(self, store: GuardedLeases, key_id: str, lease: str, count: int) -> None:
        async with self._renewing_lock:
            try:
                await store.guard.call(lambda: store.leases.give_back(key_id, lease, count))
            except StoreDown:
                return  # it expires

    async def _renew(self, store: GuardedLeases) -> None:
        while True:
            await asyncio.sleep(self._renew_period_s)
            for key_id in list(self._leases):
                async with self._renewing_lock:
                    leases = dict(self._leases.get(key_id, {}))
                    if not leases:
                        continue
                    try:
                        await _call_renew(store, key_id, leases)
                    except StoreDown:
                        break

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._withdrawing.add(task)
        task.add_done_callback(self._withdrawing.discard)


async def _call_renew(store: GuardedLeases, key_id: str, leases: dict[str, int]) -> None:
    await store.guard.call(lambda: store.leases.renew(key_id, leases))
