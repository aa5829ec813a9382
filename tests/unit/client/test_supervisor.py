# SPDX-License-Identifier: Apache-2.0
"""The supervisor over a fake server: drains, restarts, gives up, and never leaves a process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import supervised

DEADLINE_S = 20.0


class Supervised:
    """The driver process, with what it printed and the processes below it."""

    def __init__(self, state: Path, *behaviours: str, grace_s: float = 20.0) -> None:
        self.state = state
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(supervised.__file__), str(state), str(port), str(grace_s), *behaviours]
        self.output = state / "output"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def server_pids(self) -> list[int]:
        path = self.state / "pids"
        return [int(item) for item in path.read_text().split()] if path.exists() else []

    def wait_for(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_true():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def wait_until_says(self, text: str) -> None:
        self.wait_for(lambda: text in self.text)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(*behaviours: str, grace_s: float = 20.0) -> Supervised:
        started.append(Supervised(tmp_path, *behaviours, grace_s=grace_s))
        return started[-1]

    yield start
    for item in started:
        item.process.kill()
        item.process.wait()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_sigterm_drains_then_ends_with_success(supervise: Callable[..., Supervised]) -> None:
    running = supervise()
    running.wait_until_says("ready")
    running.process.send_signal(signal.SIGTERM)
    running.wait_for(lambda: (running.state / "draining").exists())
    assert int((running.state / "draining").read_text()) == running.server_pids[0]
    assert is_alive(running.server_pids[0])  # a request still runs

    (running.state / "idle").touch()
    assert running.wait() == 0
    assert not is_alive(running.server_pids[0])


def test_requests_that_take_longer_than_the_grace_are_cut_off(supervise: Callable[..., Supervised]) -> None:
    running = supervise(grace_s=0.2)
    running.wait_until_says("ready")
    running.process.send_signal(signal.SIGINT)
    assert running.wait() == 0
    assert "--grace-s" in running.text


def test_a_second_signal_stops_at_once(supervise: Callable[..., Supervised]) -> None:
    running = supervise("ignore-sigterm", "orphan")
    running.wait_until_says("ready")
    orphan = int((running.state / "orphan").read_text())
    running.process.send_signal(signal.SIGINT)
    running.wait_for(lambda: (running.state / "draining").exists())
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    assert not is_alive(running.server_pids[0])
    assert not is_alive(orphan)


def test_a_server_that_ignores_sigterm_is_killed(supervise: Callable[..., Supervised]) -> None:
    running = supervise("ignore-sigterm")
    running.wait_until_says("ready")
    (running.state / "idle").touch()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert not is_alive(running.server_pids[0])


def test_a_killed_server_is_back_and_leaves_no_process(supervise: Callable[..., Supervised]) -> None:
    running = supervise("orphan")
    running.wait_until_says("ready")
    orphan = int((running.state / "orphan").read_text())
    os.kill(running.server_pids[0], signal.SIGKILL)
    running.wait_until_says("the server is back")
    assert "signal 9 (SIGKILL)" in running.text
    assert running.text.count("ready") == 1
    assert not is_alive(orphan)
    assert len(running.server_pids) == 2

    (running.state / "idle").touch()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert not is_alive(int((running.state / "orphan").read_text()))


def test_a_crash_is_reported_with_its_cause(supervise: Callable[..., Supervised]) -> None:
    running = supervise("crash-once")
    running.wait_until_says("the server is back")
    assert "exit code 3; its last words: the stub died; restarting in" in running.text


def test_a_crash_loop_ends_with_the_cause(supervise: Callable[..., Supervised]) -> None:
    running = supervise("crash-always")
    assert running.wait() == 1
    assert "crashed 5 times within 60 s, giving up" in running.text
    assert "the stub died" in running.text
    assert len(running.server_pids) == 5


def test_a_model_that_cannot_load_ends_the_start_with_one_line(supervise: Callable[..., Supervised]) -> None:
    running = supervise("load-failure")
    assert running.wait() == 1
    assert running.text == "error: tensor lm_head.weight is missing\n"
    assert len(running.server_pids) == 1


def test_the_server_dies_with_a_killed_supervisor(supervise: Callable[..., Supervised]) -> None:
    running = supervise()
    running.wait_until_says("ready")
    running.process.kill()
    running.process.wait()
    running.wait_for(lambda: not is_alive(running.server_pids[0]))
