# SPDX-License-Identifier: Apache-2.0
"""Asking a core for its counters without being one of its clients.

A reader says no Hello, so that it neither keeps a core alive nor is counted.
"""

from __future__ import annotations

import select
import time
from pathlib import Path

from wavetrain_engine.ipc.connection import Connection
from wavetrain_engine.ipc.frames import Drain, GetStats, Stats, decode_core_frame, encode
from wavetrain_engine.stats import EngineStats


class StatsReader:
    """A connection to one core for questions, one at a time."""

    def __init__(self, path: Path) -> None:
        """Connects to the core that listens at `path`.

        Raises:
            OSError: nobody listens there.
        """
        self._connection = Connection.to(path)
        self._poller = select.poll()
        self._poller.register(self._connection, select.POLLIN)
        self._ticket = 0

    def drain(self) -> None:
        """Has the core refuse new requests from now on."""
        self._connection.send(encode(Drain()))

    def read(self, timeout_s: float) -> EngineStats | None:
        """Returns the counters; None from a core that has ended, or does not answer in time (while it loads)."""
        self._ticket += 1
        self._connection.send(encode(GetStats(ticket=self._ticket)))
        deadline_s = time.monotonic() + timeout_s
        while not self._connection.is_closed and self._poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            for frame in map(decode_core_frame, self._connection.receive()):
                if isinstance(frame, Stats) and frame.ticket == self._ticket:
                    return frame.stats
        return None

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._connection.close()
