# SPDX-License-Identifier: Apache-2.0
"""Draining an engine core from outside: `wavetrain serve` has it refuse new requests, then waits until it is idle.

The drainer is no client in the core's books: it says no Hello, so that it neither keeps a core alive nor is counted.
"""

from __future__ import annotations

from pathlib import Path

import zmq

from wavetrain_engine.ipc.frames import Drain, GetStats, Stats, decode_core_frame, encode
from wavetrain_engine.ipc.process_watch import start_ticks
from wavetrain_engine.ipc.runtime_dir import RuntimeDir

_ANSWER_TIMEOUT_MS = 1000


class DrainClient:
    """Asks one core to refuse new requests, at construction, and answers from then on whether it is idle."""

    def __init__(self, address: str, core_pid: int) -> None:
        self._core_pid = core_pid
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._socket.send(encode(Drain()))
        self._ticket = 0

    @classmethod
    def of_server(cls, engine_config: Path, server_pid: int) -> DrainClient | None:
        """The drain of the core that a Triton server's models use; None where no core runs, so nothing is to drain.

        Raises:
            ConfigError: the runtime folder is not private to this user.
        """
        runtime_dir = RuntimeDir.of_server(engine_config, server_pid)
        core_pid = runtime_dir.running_core()
        return None if core_pid is None else cls(runtime_dir.socket_address(core_pid), core_pid)

    def is_idle(self) -> bool:
        """Whether no request runs or waits. A core that ended is idle; one too busy to answer within 1 s is not."""
        if start_ticks(self._core_pid) is None:
            return True
        self._ticket += 1
        self._socket.send(encode(GetStats(ticket=self._ticket)))
        while self._socket.poll(_ANSWER_TIMEOUT_MS):
            frame = decode_core_frame(self._socket.recv())
            if isinstance(frame, Stats) and frame.ticket == self._ticket:
                return frame.stats.num_running + frame.stats.num_waiting == 0
        return False

    def close(self) -> None:
        """Closes the socket. Idempotent."""
        self._socket.close()
        self._context.term()
