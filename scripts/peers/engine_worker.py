# SPDX-License-Identifier: Apache-2.0
"""An engine's benchmark program as a worker process that takes turns with others."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from process_cpu import cpu_seconds

_LOAD_TIMEOUT_S = 600
_ANSWER_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 20


class EngineWorker:
    """Starts the program and waits until its engine is loaded.

    Args:
        key: what tables call the engine.
        log: gets what the program says besides its answers.

    Raises:
        SystemExit: it ended, or did not answer in time; the message names the log.
    """

    def __init__(self, key: str, command: Sequence[str], log: Path) -> None:
        self.key = key
        self._log = log
        with log.open("w", encoding="utf-8") as sink:
            # A session of its own, so that what the engine starts can be ended with it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, start_new_session=True
            )
        try:
            self.facts = self._read(_LOAD_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def ask(self, **command: object) -> dict[str, Any]:
        """Gives a command and returns its answer.

        Raises:
            SystemExit: the engine failed.
        """
        stdin = _pipe(self._process.stdin)
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        answer = self._read(_ANSWER_TIMEOUT_S)
        if "error" in answer:
            raise SystemExit(f"{self.key} failed on {command}: {answer['error']}\nIts log: {self._log}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time of the program and what it has started."""
        return sum(cpu_seconds(self._process.pid).values())

    def stop(self) -> None:
        """Ends the program: it does so itself when its input ends, and is killed when that takes long."""
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        stdout = _pipe(self._process.stdout)
        ready, _, _ = select.select([stdout], [], [], timeout_s)
        line = stdout.readline() if ready else ""
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise SystemExit("\n".join([f"{self.key} gave no answer; the end of its log, {self._log}:", *tail]))
        return json.loads(line)


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the program was started without pipes")
    return stream
