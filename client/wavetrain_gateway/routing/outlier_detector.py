# SPDX-License-Identifier: Apache-2.0
"""Takes a replica out for a while that fails far more often than requests may, while others do not.

Failure-percentage ejection as Envoy has it: by the share of failed requests in a window, for longer each time, and
never so many replicas that the rest has to carry what it cannot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Record:
    """Outcomes of one replica's newest requests: (when, whether it failed)."""

    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque[tuple[float, bool]](maxlen=1024))
    ejected_until_s: float = 0.0
    num_ejections: int = 0


class OutlierDetector:
    """Watches the replicas of one model.

    Args:
        max_failed: share of failed requests beyond which a replica is taken out.
        min_requests: fewer in the window say nothing.
        window_s: how far back requests count.
        first_ejection_s: how long a replica is out; the second time twice that, and so on, up to `max_ejection_s`.
        max_ejected: share of the replicas that may be out at once; one always may where there are two.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        max_failed: float = 0.5,
        min_requests: int = 5,
        window_s: float = 30.0,
        first_ejection_s: float = 10.0,
        max_ejection_s: float = 300.0,
        max_ejected: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_failed = max_failed
        self._min_requests = min_requests
        self._window_s = window_s
        self._first_ejection_s = first_ejection_s
        self._max_ejection_s = max_ejection_s
        self._max_ejected = max_ejected
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def is_ejected(self, replica: str) -> bool:
        """Whether the replica is out now."""
        record = self._records.get(replica)
        return record is not None and self._clock() < record.ejected_until_s

    def num_ejections(self, replica: str) -> int:
        """How often the replica was taken out."""
        record = self._records.get(replica)
        return record.num_ejections if record is not None else 0

    def record(self, replica: str, *, has_failed: bool, peers: Iterable[str]) -> bool:
        """Notes the outcome of a request; returns whether the replica is taken out for it.

        Args:
            replica: who was asked.
            has_failed: for a reason that is the replica's.
            peers: all replicas of the model that could take requests, `replica` among them.
        """
        now_s = self._clock()
        record = self._records.setdefault(replica, _Record())
        record.outcomes.append((now_s, has_failed))
        while record.outcomes[0][0] <= now_s - self._window_s:
            record.outcomes.popleft()
        if not has_failed or self.is_ejected(replica):
            return False
        num_failed = sum(failed for _, failed in record.outcomes)
        num_requests = len(record.outcomes)
        if num_requests < self._min_requests or num_failed <= self._max_failed * num_requests:
            return False
        if not self._may_eject(replica, list(peers)):
            return False
        record.num_ejections += 1
        out_s = min(self._max_ejection_s, self._first_ejection_s * record.num_ejections)
        record.ejected_until_s = now_s + out_s
        record.outcomes.clear()  # it begins anew when it comes back
        return True

    def forget(self, replica: str) -> None:
        """The replica is gone."""
        self._records.pop(replica, None)

    def _may_eject(self, replica: str, peers: list[str]) -> bool:
        num_out = sum(self.is_ejected(peer) for peer in peers if peer != replica)
        most = max(1, int(self._max_ejected * len(peers)))
        return num_out + 1 <= most and num_out + 1 < len(peers)
