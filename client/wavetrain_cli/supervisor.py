# SPDX-License-Identifier: Apache-2.0
"""Keeps a Triton server running, and ends it well.

    starting ──ready──▶ serving ──signal──▶ draining ──idle or grace over──▶ stopped (0)
        │                  │ ended by itself
        │                  ▼
        │              back-off ──▶ starting            five crashes within a minute ──▶ failed (1)
        └─ never was ready ──▶ failed (1)

Invariants:
    1. when `run` returns or raises, no process that it started, directly or not, is alive
    2. if this process is killed, the kernel kills the server (launcher.py), and the engine core ends with it
    3. before a restart nothing of the old server is left, not even its regions in /dev/shm
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wavetrain_cli.errors import CommandError
from wavetrain_cli.process_tree import adopt_orphans, end_descendants
from wavetrain_cli.server_log import ServerLog

_LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorPolicy:
    """How patient the supervisor is."""

    grace_s: float = 30.0
    exit_timeout_s: float = 10.0  # from SIGTERM to SIGKILL; the server's own time-out is shorter
    orphan_grace_s: float = 3.0  # stubs and the engine core end by themselves within a second
    first_back_off_s: float = 1.0
    max_back_off_s: float = 16.0
    max_crashes: int = 5
    crash_window_s: float = 60.0
    poll_interval_s: float = 0.1


class Service(Protocol):
    """What the supervisor has to know about the server it keeps."""

    def is_ready(self) -> bool:
        """Whether all models answer; False while nothing listens."""
        ...

    def begin_drain(self, server_pid: int) -> None:
        """Makes the server's engine refuse new requests; those that run go on."""
        ...

    def is_idle(self) -> bool:
        """Whether, after `begin_drain`, no request runs or waits any more."""
        ...


class Supervisor:
    """Runs one server command until a signal or a crash loop.

    Args:
        say: takes the lines meant for a person.
        on_ready: called once, when the first server is ready.
        on_ended: called whenever a server and all its processes have ended; removes what they left behind.
        companions: ids of children that are not the server's and outlive it.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        service: Service,
        log: ServerLog,
        say: Callable[[str], None],
        on_ready: Callable[[], None],
        on_ended: Callable[[], None],
        companions: Callable[[], Collection[int]] = frozenset,
        policy: SupervisorPolicy | None = None,
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._service = service
        self._log = log
        self._say = say
        self._on_ready = on_ready
        self._on_ended = on_ended
        self._companions = companions
        self._policy = policy or SupervisorPolicy()
        self._signals: list[int] = []
        self._wake = threading.Event()
        self._crashes: deque[float] = deque(maxlen=self._policy.max_crashes)
        self._was_ready = False

    def run(self) -> int:
        """Serves until SIGINT or SIGTERM; returns 0 then, or 128 + the number of a second signal.

        Must be called from the main thread, which has to stay alive: the kernel ties the server's life to it.

        Raises:
            CommandError: the server never became ready, or crashed too often; the cause is in the message.
        """
        adopt_orphans()
        with self._signal_handlers():
            while True:
                process, reader = self._start()
                try:
                    code = self._watch(process)
                finally:
                    self._clean_up(process, reader)
                if code is not None:
                    return code
                self._back_off(process)
                if self._signals:
                    return 0

    def _start(self) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        self._log.forget()
        # -I -S: the launcher needs no site-packages, and start-up is a few milliseconds.
        launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
        process = subprocess.Popen(
            launcher + self._command,
            env=self._environment,
            cwd="/",  # the stubs' sys.path begins with the working directory: keep the caller's files out of it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for us alone: we drain first
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self._log.read, args=(process.stdout,), name="server-log", daemon=True)
        reader.start()
        return process, reader

    def _watch(self, process: subprocess.Popen[bytes]) -> int | None:
        """Follows one server process. Returns the exit code to end with, or None when it crashed."""
        is_ready = False
        while process.poll() is None:
            if self._signals:
                return self._stop(process, is_ready=is_ready)
            if not is_ready and self._service.is_ready():
                is_ready = True
                self._report_ready()
            self._sleep(self._policy.poll_interval_s)
        return 0 if self._signals else None

    def _report_ready(self) -> None:
        self._log.started()
        if self._was_ready:
            self._say("the server is back")
        else:
            self._was_ready = True
            self._on_ready()

    def _stop(self, process: subprocess.Popen[bytes], *, is_ready: bool) -> int:
        if is_ready:
            self._drain(process)
        if len(self._signals) > 1:
            return self._kill(process)
        process.terminate()
        deadline = time.monotonic() + (self._policy.exit_timeout_s if is_ready else self._policy.orphan_grace_s)
        while process.poll() is None:
            if len(self._signals) > 1:
                return self._kill(process)
            if time.monotonic() > deadline:
                process.kill()
                break
            self._sleep(self._policy.poll_interval_s)
        return 0

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        grace_s = self._policy.grace_s
        self._say(
            f"draining: new requests are refused, running ones have up to {grace_s:g} s; signal again to stop at once"
        )
        self._service.begin_drain(process.pid)
        deadline = time.monotonic() + grace_s
        while process.poll() is None and len(self._signals) == 1:
            if self._service.is_idle():
                # The last tokens may still be on their way from the models to the callers.
                self._sleep(5 * self._policy.poll_interval_s)
                return
            if time.monotonic() > deadline:
                self._say(f"stopping: some requests did not finish within {grace_s:g} s (--grace-s) and are cut off")
                return
            self._sleep(self._policy.poll_interval_s)

    def _kill(self, process: subprocess.Popen[bytes]) -> int:
        self._say("stopping at once")
        process.kill()
        return 128 + self._signals[-1]

    def _clean_up(self, process: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        """Leaves nothing of a server that ended, or has to end now."""
        if sys.exc_info()[0] is not None or len(self._signals) > 1:
            process.kill()
        process.wait()
        grace_s = 0.0 if len(self._signals) > 1 else self._policy.orphan_grace_s
        end_descendants(grace_s=grace_s, spared=self._companions())
        # Nobody holds the pipe's other end now, so the reader comes to its end.
        reader.join()
        if process.stdout is not None:
            process.stdout.close()
        self._on_ended()

    def _back_off(self, process: subprocess.Popen[bytes]) -> None:
        policy = self._policy
        if not self._was_ready:
            raise CommandError(self._log.load_failure or f"the Triton server did not start: {self._describe(process)}")
        now = time.monotonic()
        self._crashes.append(now)
        recent = [moment for moment in self._crashes if now - moment <= policy.crash_window_s]
        if len(recent) >= policy.max_crashes:
            raise CommandError(
                f"the Triton server crashed {len(recent)} times within {policy.crash_window_s:g} s, giving up; "
                f"the last time: {self._describe(process)}"
            )
        delay_s = min(policy.first_back_off_s * 2 ** (len(recent) - 1), policy.max_back_off_s)
        self._say(f"the Triton server crashed: {self._describe(process)}; restarting in {delay_s:g} s")
        deadline = time.monotonic() + delay_s
        while not self._signals and (left_s := deadline - time.monotonic()) > 0:
            self._sleep(left_s)

    def _describe(self, process: subprocess.Popen[bytes]) -> str:
        code = process.returncode
        how = f"it ended with exit code {code}"
        if code < 0:
            names = {item.value: item.name for item in signal.Signals}
            how = f"it was ended by signal {-code} ({names.get(-code, 'unknown')})"
        if (cause := self._log.load_failure) is not None:
            return f"{how}: {cause}"
        errors = self._log.last_errors
        return f"{how}; its last words: {' / '.join(errors[-3:])}" if errors else how

    def _sleep(self, seconds: float) -> None:
        """Sleeps, but not through a signal."""
        self._wake.wait(seconds)
        self._wake.clear()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Generator[None]:
        def count(number: int, _frame: object) -> None:
            self._signals.append(number)
            self._wake.set()

        previous = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
