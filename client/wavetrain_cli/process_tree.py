# SPDX-License-Identifier: Apache-2.0
"""The processes below this one, so that none outlives the command.

`adopt_orphans` makes this process the parent of every descendant whose own parent dies (PR_SET_CHILD_SUBREAPER). What
is below us then is all there is, whichever sessions and process groups it moved to.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLL_INTERVAL_S = 0.02
# Only a process that hangs inside the kernel outlives a SIGKILL for long, and nobody can end that.
_KILL_TIMEOUT_S = 10.0


def adopt_orphans() -> None:
    """From now on orphaned descendants become children of this process.

    Raises:
        OSError: the kernel refuses; it never does on Linux 3.4 or later.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(pid: int) -> list[int]:
    """The ids of all processes below `pid`, parents before children; ended ones that nobody waited for are left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _living_parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    level = children.get(pid, [])
    while level:
        found += level
        level = [child for parent in level for child in children.get(parent, [])]
    return found


def end_descendants(*, grace_s: float, spared: Collection[int] = ()) -> list[int]:
    """Waits up to `grace_s` for everything below this process to end by itself, then kills what is left.

    Returns the ids of the killed ones. Collects the children's exit statuses, so nobody else may be waiting for one.

    Args:
        spared: children that stay, childless ones; their exit statuses are left alone.
    """
    deadline = time.monotonic() + grace_s
    while (has_any := _reap_children(spared)) and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL_S)
    killed: list[int] = []
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    # A killed parent's children become ours and are found in the next round.
    while has_any and time.monotonic() < deadline:
        for item in set(descendants(os.getpid())).difference(spared):
            with contextlib.suppress(ProcessLookupError):
                os.kill(item, signal.SIGKILL)
                killed.append(item)
        time.sleep(_POLL_INTERVAL_S)
        has_any = _reap_children(spared)
    return sorted(set(killed))


def _living_parent(entry: Path) -> int | None:
    try:
        # The name, in brackets, may itself hold spaces and brackets.
        state, parent = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(parent)


def _reap_children(spared: Collection[int]) -> bool:
    """Collects ended children. Returns whether any are left, be it one whose last threads are only just ending."""
    has_any = False
    for child in _children(os.getpid()):
        if child in spared:
            continue
        try:
            has_any = not os.waitpid(child, os.WNOHANG)[0] or has_any
        except ChildProcessError:  # someone else has collected it
            continue
    return has_any


def _children(pid: int) -> list[int]:
    """The ids of a process's children, ended ones too."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found.append(int(entry.name))
    return found
