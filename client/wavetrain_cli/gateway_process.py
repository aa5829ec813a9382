# SPDX-License-Identifier: Apache-2.0
"""The gateway as a child of `wavetrain serve`: started beside the server, kept alive, drained with it.

It is a process of its own, so that neither its work nor its death is the supervisor's, and it outlives a Triton server
that crashes: callers then get 503 and a Retry-After in place of a refused connection.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from wavetrain_cli.supervisor import Service

_LAUNCHER = Path(__file__).with_name("launcher.py")
_FIRST_BACK_OFF_S = 0.5
_MAX_BACK_OFF_S = 8.0
_EXIT_TIMEOUT_S = 5.0
_POLL_INTERVAL_S = 0.05


class GatewayProcess:
    """Runs `wavetrain gateway` until `close`; starts it again when it ends by itself.

    Args:
        arguments: of `wavetrain gateway`.
        log_path: takes all its output.
        say: takes the lines meant for a person.
    """

    def __init__(self, arguments: Sequence[str], *, log_path: Path, say: Callable[[str], None]) -> None:
        self._arguments = list(arguments)
        self._log_path = log_path
        self._say = say
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ending = threading.Event()
        self._has_listened = threading.Event()
        self._is_over = threading.Event()
        # The kernel ties a child's life to the thread that made it, so this one lives as long as the child.
        self._keeper = threading.Thread(target=self._keep, name="gateway", daemon=True)

    def start(self) -> None:
        """Starts it; returns at once."""
        self._keeper.start()

    def wait_until_ready(self, host: str, port: int, timeout_s: float) -> bool:
        """Waits until it has found the server behind it. Returns whether it has, or asks for a key before it tells."""
        deadline_s = time.monotonic() + timeout_s
        if not self._has_listened.wait(timeout_s):
            return False
        while time.monotonic() < deadline_s:
            connection = http.client.HTTPConnection(host, port, timeout=2.0)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/readyz", headers={"host": "localhost"})
                if connection.getresponse().status in (200, 401):
                    return True
            connection.close()
            time.sleep(_POLL_INTERVAL_S)
        return False

    @property
    def pids(self) -> frozenset[int]:
        """The process's id, if it runs."""
        process = self._process
        return frozenset() if process is None else frozenset({process.pid})

    @property
    def is_over(self) -> bool:
        """Whether, after `drain`, it has ended."""
        return self._is_over.is_set()

    def drain(self) -> None:
        """Lets running requests finish and refuses new ones; it ends by itself then."""
        with self._lock:
            if self._is_ending.is_set():
                return
            self._is_ending.set()
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.terminate()

    def close(self) -> None:
        """Ends it within a few seconds. Idempotent."""
        self.drain()
        if not self._keeper.is_alive():
            return
        self._keeper.join(_EXIT_TIMEOUT_S)
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        self._keeper.join(_EXIT_TIMEOUT_S)

    def _keep(self) -> None:
        back_off_s = _FIRST_BACK_OFF_S
        with self._log_path.open("w", encoding="utf-8") as log:
            while not self._is_ending.is_set():
                started_s = time.monotonic()
                code = self._run_once(log)
                if self._is_ending.is_set():
                    break
                if time.monotonic() - started_s > 60.0:
                    back_off_s = _FIRST_BACK_OFF_S
                self._say(
                    f"the gateway ended with code {code}; starting it again in {back_off_s:g} s ({self._log_path})"
                )
                self._is_ending.wait(back_off_s)
                back_off_s = min(2 * back_off_s, _MAX_BACK_OFF_S)
        self._is_over.set()

    def _run_once(self, log: TextIO) -> int:
        launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
        command = [sys.executable, "-m", "wavetrain_cli.main", "gateway", *self._arguments]
        with self._lock:
            if self._is_ending.is_set():
                return 0
            process = self._process = subprocess.Popen(
                launcher + command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            )
        if process.stdout is not None:
            # Its only line there says that it takes connections; the end of it is the end of the process.
            for line in process.stdout:
                log.write(line.decode("utf-8", "replace"))
                self._has_listened.set()
            process.stdout.close()
        code = process.wait()
        with self._lock:
            self._process = None
        return code


class FrontedService:
    """A server with a gateway in front: both drain together. Implements the supervisor's Service."""

    def __init__(self, service: Service, gateway: GatewayProcess) -> None:
        self._service = service
        self._gateway = gateway

    def is_ready(self) -> bool:
        """Whether the server is."""
        return self._service.is_ready()

    def begin_drain(self, server_pid: int) -> None:
        """The gateway first: what reaches it from now on is told so before it reaches the engine."""
        self._gateway.drain()
        self._service.begin_drain(server_pid)

    def is_idle(self) -> bool:
        """Whether the gateway has answered all, and the engine has nothing to do."""
        return self._gateway.is_over and self._service.is_idle()
