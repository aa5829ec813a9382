# SPDX-License-Identifier: Apache-2.0
"""A priority queue of requests from whose middle one can be taken: who waits, and whose deadline is next."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from wavetrain_engine.core.request_state import RequestState


class RequestHeap:
    """Requests by a key, equal keys by arrival. A request's key must not change while it is in here.

    Taking one from the middle only marks it; what is marked is skipped when it surfaces, and swept out when
    it outnumbers the rest, so cancelled requests do not pile up behind a long queue.
    """

    def __init__(self, key: Callable[[RequestState], float]) -> None:
        self._key = key
        self._entries: list[tuple[float, int]] = []
        self._members: dict[int, RequestState] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._members.values())

    def push(self, request: RequestState) -> None:
        """Adds a request that is not in here."""
        heapq.heappush(self._entries, (self._key(request), request.index))
        self._members[request.index] = request

    def peek(self) -> RequestState | None:
        """Returns the first request and leaves it in here; None: empty."""
        while self._entries:
            request = self._members.get(self._entries[0][1])
            if request is not None:
                return request
            heapq.heappop(self._entries)
        return None

    def discard(self, request: RequestState) -> None:
        """Takes a request out, if it is in here."""
        self._members.pop(request.index, None)
        if len(self._entries) > 2 * len(self._members) + 16:
            self._entries = [(self._key(member), member.index) for member in self._members.values()]
            heapq.heapify(self._entries)
