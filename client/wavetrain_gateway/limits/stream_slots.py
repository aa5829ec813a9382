# SPDX-License-Identifier: Apache-2.0
"""How many sequences of a key run at once in this process. `shared_streams` counts those of all gateways."""

from __future__ import annotations


class StreamSlots:
    """Counts running sequences by key. What is taken has to be given back."""

    def __init__(self) -> None:
        self._running: dict[str, int] = {}

    def running(self, key_id: str) -> int:
        """How many run now."""
        return self._running.get(key_id, 0)

    def take(self, key_id: str, limit: int | None, count: int) -> bool:
        """Counts `count` more, if that does not make them more than `limit`."""
        running = self.running(key_id) + count
        if limit is not None and running > limit:
            return False
        self._running[key_id] = running
        return True

    def give_back(self, key_id: str, count: int) -> None:
        """Counts `count` fewer."""
        running = self.running(key_id) - count
        if running > 0:
            self._running[key_id] = running
        else:
            self._running.pop(key_id, None)
