# SPDX-License-Identifier: Apache-2.0
"""Which requests have news to send, and which of them are due: pure bookkeeping, without a thread or a clock.

Invariants:
    1. what is put is taken, once for each time it waits: never lost, never twice at a time
    2. what is put as due now is in the next take; what may wait is in it as soon as the pace allows, all of it
       together, as a burst costs less than its responses one by one
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar

from wavetrain_engine.serving.send_pace import SendPace

_Item = TypeVar("_Item")


class Haste(IntEnum):
    """How soon news have to be dealt with."""

    LATER = 1  # sent with the next burst
    LOOK = 2  # looked at now, as they may hold the request's end; sent with a burst
    NOW = 3  # sent now


class Outbox(Generic[_Item]):
    """Collects items with news. `put` may be called by any thread, the rest by the sending one only."""

    def __init__(self, pace: SendPace, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = pace
        self._clock = clock
        self._arrived: deque[tuple[_Item, Haste]] = deque()
        self._later: dict[_Item, None] = {}

    def put(self, item: _Item, haste: Haste) -> bool:
        """Takes an item with news. Returns whether the sending thread has to be woken, having something to do now."""
        self._arrived.append((item, haste))
        return haste is not Haste.LATER or self._pace.wait_s(self._clock()) == 0.0

    def take(self) -> tuple[list[_Item], list[_Item]]:
        """Returns, and forgets, the items to look at and the items to send, none of them twice."""
        look: dict[_Item, None] = {}
        due: dict[_Item, None] = {}
        while self._arrived:
            item, haste = self._arrived.popleft()
            (due if haste is Haste.NOW else look if haste is Haste.LOOK else self._later)[item] = None
        if self._later and self._pace.wait_s(self._clock()) == 0.0:
            due |= self._later
        for item in due:
            look.pop(item, None)
            self._later.pop(item, None)
        return list(look), list(due)

    def wait_s(self) -> float | None:
        """Returns how long to wait before the next `take`; None: until `put` asks for it."""
        wait_s = self._pace.wait_s(self._clock())
        # Looked at after the clock: what arrives from here on is put at a later moment, and `put` sees that it is due.
        if self._arrived:
            return 0.0
        # Without an item too: `put` wakes nobody for one that has to wait, so somebody has to be awake in time.
        return wait_s if wait_s > 0.0 or self._later else None
