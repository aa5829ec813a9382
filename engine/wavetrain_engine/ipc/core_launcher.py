# SPDX-License-Identifier: Apache-2.0
"""Starting and ending the core process. Whoever holds the start lock of the runtime folder starts it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from wavetrain_engine.ipc.process_watch import ProcessWatch
from wavetrain_engine.ipc.runtime_dir import RuntimeDir

_LOGGER = logging.getLogger(__name__)
_KILL_TIMEOUT_S = 5.0


class CoreLauncher:
    """Finds the core of one runtime folder, starts it, and ends it. Used by one thread at a time."""

    def __init__(
        self, engine_config: Path, runtime_dir: RuntimeDir, server_pid: int, command: Sequence[str] = ()
    ) -> None:
        self._runtime_dir = runtime_dir
        self._command = [
            *(command or (sys.executable, "-m", "wavetrain_engine.core_process")),
            f"--engine-config={engine_config}",
            f"--runtime-dir={runtime_dir.path}",
            f"--server-pid={server_pid}",
        ]

    def find_or_start(self) -> int:
        """Returns the running core's pid, of one started now if none was.

        Raises:
            OSError: the process could not be started.
        """
        with self._runtime_dir.start_lock():
            pid = self._runtime_dir.running_core()
            if pid is not None:
                return pid
            # A session of its own: the terminal's Ctrl-C, which the server drains on, does not reach it, and
            # its whole process group can be ended at once. stderr is the server's log.
            child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)
            self._runtime_dir.record_core(child.pid)
            _LOGGER.info("started the engine core as process %d", child.pid)
            threading.Thread(target=_reap, args=(child,), name="core-reaper", daemon=True).start()
            return child.pid

    def kill_core(self, pid: int) -> None:
        """Kills a core's whole process group, at once."""
        _kill_group(pid)

    def end_core(self, timeout_s: float) -> None:
        """Waits for the core, which nobody needs any more, to end by itself; kills its process group after that."""
        pid = self._runtime_dir.running_core()
        if pid is not None:
            watch = ProcessWatch(pid)
            try:
                self.await_end(watch, timeout_s)
            finally:
                watch.close()

    def await_end(self, watch: ProcessWatch, timeout_s: float) -> None:
        """Waits for one core, which is about to end; kills its process group if it has not in time."""
        if not _wait_for_end(watch, timeout_s):
            _LOGGER.warning("the engine core did not end within %.1f s; it is killed", timeout_s)
            _kill_group(watch.pid)
            _wait_for_end(watch, _KILL_TIMEOUT_S)


def _reap(child: subprocess.Popen[bytes]) -> None:
    # Only the process that started a core is its parent; without this a dead one would stay as a zombie.
    status = child.wait()
    _LOGGER.log(logging.INFO if status == 0 else logging.ERROR, "the engine core process ended with status %d", status)


def _wait_for_end(watch: ProcessWatch, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while watch.is_alive():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
