# SPDX-License-Identifier: Apache-2.0
"""The runtime folder: private, one per server and configuration, cleaned of dead servers; and watching processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.ipc.process_watch import ProcessWatch, start_ticks
from wavetrain_engine.ipc.runtime_dir import RuntimeDir, remove_stale


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rt")
    path.chmod(0o700)
    return path


def test_one_folder_per_server_and_config(base: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    directory = RuntimeDir.of_server(one, os.getpid(), base)
    assert RuntimeDir.of_server(one, os.getpid(), base).path == directory.path
    assert RuntimeDir.of_server(other, os.getpid(), base).path != directory.path
    assert RuntimeDir.of_server(one, os.getppid(), base).path != directory.path
    assert directory.path.stat().st_mode & 0o777 == 0o700


def test_folders_of_dead_servers_are_removed(base: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        dead = RuntimeDir.of_server(tmp_path / "a.toml", server.pid, base)
        server.kill()
        server.wait()
    alive = RuntimeDir.of_server(tmp_path / "a.toml", os.getpid(), base)
    (base / "not-ours").mkdir()
    assert not dead.path.exists()
    assert alive.path.exists()
    assert remove_stale(base) == []
    assert (base / "not-ours").exists()


def test_a_pid_used_again_is_another_server(base: Path) -> None:
    reused = base / f"0123456789ab-{os.getpid()}-1"
    reused.mkdir()
    assert remove_stale(base) == [reused]


def test_folders_that_others_may_enter_are_refused(base: Path) -> None:
    (base / "open").mkdir()
    (base / "open").chmod(0o755)
    with pytest.raises(ConfigError, match="not private"):
        RuntimeDir(base / "open")


def test_paths_too_long_for_a_socket_are_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter one"):
        RuntimeDir(base / ("x" * 100))


def test_last_client_is_told(base: Path) -> None:
    directory = RuntimeDir(base / "d")
    first, second = directory.join_clients(), directory.join_clients()
    assert not directory.leave_clients(first)
    assert directory.leave_clients(second)


def test_recorded_core_is_found_while_it_runs(base: Path) -> None:
    directory = RuntimeDir(base / "d")
    assert directory.running_core() is None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as core:
        directory.record_core(core.pid)
        assert directory.running_core() == core.pid
        core.kill()
        core.wait()
    assert directory.running_core() is None


def test_watch_sees_the_end_even_of_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch = ProcessWatch(child.pid)
    try:
        assert watch.is_alive()
        assert watch.fileno() is not None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert not watch.is_alive()
        assert start_ticks(child.pid) is None
    finally:
        watch.close()
        with child:
            child.wait()


def test_watch_without_pidfd_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    watch = ProcessWatch(os.getpid())
    assert watch.fileno() is None
    assert watch.is_alive()
    watch.close()
