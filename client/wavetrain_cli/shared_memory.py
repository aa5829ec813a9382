# SPDX-License-Identifier: Apache-2.0
"""The Triton server's regions in /dev/shm, which stay there for ever when it is killed.

A server's regions begin with a prefix of its own. Beside them lies a lock file that its supervisor holds while it
lives; whoever can take the lock of another prefix knows that its owner is gone, whatever container that lived in.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

_FOLDER = Path("/dev/shm")
_LOCK = "lock"


class SharedMemory:
    """The prefix of one supervisor's regions, and the lock that protects them."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        """Claims a prefix, and removes the regions of supervisors that are gone.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder = folder
        self.prefix = f"wavetrain-{secrets.token_hex(4)}-"
        # Locked under a name that nobody looks for, so that no other start ever finds it without its lock.
        temporary = folder / f".{self.prefix}{_LOCK}"
        self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        temporary.rename(self._lock_path(self.prefix))
        self._remove_stale()

    def remove_regions(self) -> None:
        """Removes the regions of a server that has ended."""
        _remove(self._folder, self.prefix)

    def close(self) -> None:
        """Removes the regions and gives the prefix up."""
        self.remove_regions()
        self._lock_path(self.prefix).unlink(missing_ok=True)
        os.close(self._descriptor)

    def _lock_path(self, prefix: str) -> Path:
        return self._folder / f"{prefix}{_LOCK}"

    def _remove_stale(self) -> None:
        for lock in self._folder.glob(f"wavetrain-*-{_LOCK}"):
            prefix = lock.name.removesuffix(_LOCK)
            # Another user's, or one that another start has just removed.
            with contextlib.suppress(OSError):
                descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(self._folder, prefix)
                    lock.unlink()
                finally:
                    os.close(descriptor)


def _remove(folder: Path, prefix: str) -> None:
    for region in folder.glob(f"{prefix}*"):
        if region.name != f"{prefix}{_LOCK}":
            region.unlink(missing_ok=True)
