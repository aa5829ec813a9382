# SPDX-License-Identifier: Apache-2.0
"""The folder where the models of one Triton server find their engine core: socket, locks, the core's pid.

One folder per (engine.toml, server process), named after both, so that two servers on one machine, or two
engines in one server, never meet. The server's start time is part of the name: a folder whose server is
gone is recognised for certain and removed by the next start.

Files:
    start.lock     held while someone looks whether a core runs, and starts one
    clients.lock   held shared by every attached client; who gets it exclusively is the last
    core           "<pid> <start ticks>" of the core started last
    core-<pid>.sock
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.ipc.process_watch import start_ticks

# sun_path holds 108 bytes with its final zero; "/core-<pid>.sock" needs 18 of them.
_MAX_PATH_BYTES = 107 - 18


class RuntimeDir:
    """One server's folder for one engine configuration. Creating the object creates the folder, 0700."""

    def __init__(self, path: Path) -> None:
        """Opens `path`, which must be private to this user.

        Raises:
            ConfigError: the path is too long for a socket, or belongs to someone else.
        """
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise ConfigError(
                f"the runtime folder's path has {len(os.fsencode(path))} bytes; sockets allow {_MAX_PATH_BYTES}: "
                "set TMPDIR to a shorter one"
            )
        _make_private(path.parent)
        _make_private(path)
        self.path = path

    @classmethod
    def of_server(cls, engine_config: Path, server_pid: int, base: Path | None = None) -> RuntimeDir:
        """The folder for this engine.toml under this server; folders of dead servers are removed first.

        Raises:
            ConfigError: as the constructor.
        """
        parent = base or Path(tempfile.gettempdir()) / f"wavetrain-{os.getuid()}"
        _make_private(parent)
        remove_stale(parent)
        digest = hashlib.sha256(os.fsencode(engine_config.resolve())).hexdigest()[:12]
        return cls(parent / f"{digest}-{server_pid}-{start_ticks(server_pid)}")

    def socket_path(self, core_pid: int) -> Path:
        """Where the core with this pid listens. Each core has its own, so no message can reach a later one."""
        return self.path / f"core-{core_pid}.sock"

    def running_core(self) -> int | None:
        """The pid of the core that was started last, while it runs."""
        try:
            pid, ticks = (int(word) for word in (self.path / "core").read_text(encoding="utf-8").split())
        except (OSError, ValueError):
            return None
        return pid if start_ticks(pid) == ticks else None

    def record_core(self, pid: int) -> None:
        """Makes `pid` the core that `running_core` finds. To be called under `start_lock`."""
        temporary = self.path / "core.new"
        temporary.write_text(f"{pid} {start_ticks(pid)}", encoding="utf-8")
        temporary.replace(self.path / "core")

    @contextmanager
    def start_lock(self) -> Generator[None]:
        """Holds the lock under which one client at a time looks for the core and starts it."""
        with (self.path / "start.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def join_clients(self) -> int:
        """Counts the caller in as a client. Returns a file descriptor for `leave_clients`."""
        descriptor = os.open(self.path / "clients.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def leave_clients(self, descriptor: int) -> bool:
        """Counts the caller out. Returns whether no other client is left, dead ones not counted."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def remove(self) -> None:
        """Deletes the folder; what others still hold open stays usable to them."""
        shutil.rmtree(self.path, ignore_errors=True)


def remove_stale(parent: Path) -> list[Path]:
    """Deletes the folders under `parent` whose server no longer runs, and returns them."""
    removed: list[Path] = []
    for path in parent.iterdir():
        words = path.name.split("-")
        if len(words) != 3 or not words[1].isdigit():
            continue  # not one of ours
        if str(start_ticks(int(words[1]))) != words[2]:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _make_private(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    # Another user could have made it first under a shared /tmp and would then own our socket.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            "the runtime folder is not private to this user: remove the wavetrain folder from the temporary directory, "
            "or set TMPDIR to a folder of your own"
        )
