# SPDX-License-Identifier: Apache-2.0
"""Draining an engine core from outside: `wavetrain serve` has it refuse new requests, then waits until it is idle."""

from __future__ import annotations

from pathlib import Path

from wavetrain_engine.ipc.process_watch import start_ticks
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.ipc.stats_reader import StatsReader

_ANSWER_TIMEOUT_S = 1.0


class DrainClient:
    """Asks one core to refuse new requests, at construction, and answers from then on whether it is idle."""

    def __init__(self, path: Path, core_pid: int) -> None:
        """Drains the core with this pid that listens at `path`.

        Raises:
            OSError: nobody listens there.
        """
        self._core_pid = core_pid
        self._reader = StatsReader(path)
        self._reader.drain()

    @classmethod
    def of_server(cls, engine_config: Path, server_pid: int) -> DrainClient | None:
        """The drain of the core that a Triton server's models use; None where no core runs, so nothing is to drain.

        Raises:
            ConfigError: the runtime folder is not private to this user.
        """
        runtime_dir = RuntimeDir.of_server(engine_config, server_pid)
        core_pid = runtime_dir.running_core()
        if core_pid is None:
            return None
        try:
            return cls(runtime_dir.socket_path(core_pid), core_pid)
        except OSError:  # it has just been started, or has just ended: no request can have reached it
            return None

    def is_idle(self) -> bool:
        """Whether no request runs or waits. A core that ended is idle; one too busy to answer within 1 s is not."""
        if start_ticks(self._core_pid) is None:
            return True
        stats = self._reader.read(_ANSWER_TIMEOUT_S)
        return stats is not None and stats.num_running + stats.num_waiting == 0

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._reader.close()
