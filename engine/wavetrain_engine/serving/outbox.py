# SPDX-License-Identifier: Apache-2.0
"""Which requests have news to send, and which of them are due: pure bookkeeping, without a thread.

Invariants:
    1. what is put is taken, once for each time it waits: never lost, never twice at a time
    2. what is put as due now is in the next take; what may wait is in it as soon as the pace allows, all of it
       together, as a burst costs less than its responses one by one
"""

from __future__ import annotations

import time
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
    """Collects items with news, each with the greatest haste it was put with."""

    def __init__(self, pace: SendPace, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = pace
        self._clock = clock
        self._waiting: dict[_Item, Haste] = {}

    def put(self, item: _Item, haste: Haste) -> None:
        """Takes an item with news."""
        self._waiting[item] = max(haste, self._waiting.get(item, haste))

    def take(self) -> tuple[list[_Item], list[_Item]]:
        """Returns, and forgets, the items to look at and the items to send, none of them twice."""
        least = Haste.LATER if self._pace.wait_s(self._clock()) == 0.0 else Haste.NOW
        look = [item for item, haste in self._waiting.items() if haste is Haste.LOOK]
        due = [item for item, haste in self._waiting.items() if haste >= least and haste is not Haste.LOOK]
        for item in (*look, *due):
            del self._waiting[item]
        return look, due

    def wait_s(self) -> float | None:
        """Returns how long to wait before the next `take`; None: until something is put."""
        if not self._waiting:
            return None
        return 0.0 if max(self._waiting.values()) > Haste.LATER else self._pace.wait_s(self._clock())
