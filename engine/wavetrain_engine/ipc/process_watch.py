# SPDX-License-Identifier: Apache-2.0
"""Knowing, exactly and at once, that another process has ended.

A pid alone is not enough: the kernel gives it to another process soon after. A pidfd names one process for
ever and becomes readable when it ends, so it can sit in the same poller as the socket. Where the kernel
refuses one (seccomp profiles of some containers), the pid and its start time are polled instead.
"""

from __future__ import annotations

import os
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None where there is no such running process.

    The pair (pid, start_ticks) is unique until the next boot. A zombie counts as ended.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the command, in brackets, may itself hold spaces and brackets
    return None if fields[0] in {"Z", "X"} else int(fields[19])


class ProcessWatch:
    """Watches one process, which need not be a child.

    `fileno()` is readable once the process has ended; it is None where it can only be polled with
    `is_alive()`. The owner closes it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start_ticks = start_ticks(pid)
        self._pidfd: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # it is gone already, or the kernel does not let us: is_alive tells which
            self._pidfd = None

    def fileno(self) -> int | None:
        """The pidfd for a poller, or None where there is none."""
        return self._pidfd

    def is_alive(self) -> bool:
        """Whether the very process that had the pid at construction still runs."""
        return self._start_ticks is not None and start_ticks(self.pid) == self._start_ticks

    def close(self) -> None:
        """Gives the pidfd back. Idempotent."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
