# SPDX-License-Identifier: Apache-2.0
"""News for one model that may wait: while the model asks for it, steps add to one message instead of making many.

A message costs its two ends about as much processor time as a response, on cores that the engine may need. So a
model that is not going to send for a while says so. What a caller waits for goes at once: a request's first news,
its end, and all news of a request that may end without the core seeing it.
"""

from __future__ import annotations

from wavetrain_engine.request import EngineRequest, RequestUpdate, merge_updates


class HeldUpdates:
    """Collects the updates for one model until they have to go. Knows no clock: moments are arguments."""

    def __init__(self) -> None:
        self._held_until_s = float("-inf")
        self._updates: dict[str, list[RequestUpdate]] = {}
        self._urgent: set[str] = set()
        # Whose next news are urgent: requests without a token yet, and those with stop strings, which the model looks
        # for.
        self._new: set[str] = set()
        self._watched: set[str] = set()

    def expect(self, request: EngineRequest) -> None:
        """A request of this model has begun."""
        self._new.add(request.request_id)
        if request.sampling_params.stop:
            self._watched.add(request.request_id)

    def is_new(self, request_id: str) -> bool:
        """Whether nothing was heard of the request yet."""
        return request_id in self._new

    def hold(self, until_s: float) -> None:
        """Lets news wait until then."""
        self._held_until_s = until_s

    def add(self, update: RequestUpdate) -> None:
        """Takes a step's news of one request."""
        request_id = update.request_id
        self._updates.setdefault(request_id, []).append(update)
        is_end = update.finish_reason is not None
        if is_end or request_id in self._new or request_id in self._watched:
            self._urgent.add(request_id)
        if is_end or update.new_token_ids:
            self._new.discard(request_id)
        if is_end:
            self._watched.discard(request_id)

    def take(self, now_s: float) -> list[RequestUpdate]:
        """Returns what has to go now: one update for each request, and its error after it."""
        if now_s < self._held_until_s:
            parts = [self._updates.pop(request_id) for request_id in self._urgent]
        else:
            parts = list(self._updates.values())
            self._updates.clear()
        self._urgent.clear()
        return [update for part in parts for update in _merged(part)]


def _merged(updates: list[RequestUpdate]) -> list[RequestUpdate]:
    if updates[-1].error_code is not None and len(updates) > 1:
        # An error stands for itself; what the request had said until then is good.
        return [merge_updates(updates[:-1]), updates[-1]]
    return [merge_updates(updates)]
