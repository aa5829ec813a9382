# SPDX-License-Identifier: Apache-2.0
"""Processor time of the server's processes, for benchmarks that ask where a token's time goes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# A word of the command line, and what the process is.
_ROLES = {
    "wavetrain_engine.core_process": "core",
    "triton_python_backend_stub": "models",
    "tritonserver": "tritonserver",
}


def cpu_seconds(root_pid: int) -> dict[str, float]:
    """Processor time so far by role (`core`, `models`, `tritonserver`, `other`) of a process and its descendants.

    To the kernel's tick, 10 ms as a rule: take differences over a second or more.
    """
    seconds = dict.fromkeys((*_ROLES.values(), "other"), 0.0)
    for pid in _tree(root_pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
            # The second field is the name in parentheses, which may hold spaces.
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        role = next((role for word, role in _ROLES.items() if word in command), "other")
        seconds[role] += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return seconds


def find_argument(root_pid: int, flag: str) -> str:
    """What `flag=` is given in the command line of a process or one of its descendants.

    Raises:
        LookupError: none has it.
    """
    for pid in _tree(root_pid):
        with contextlib.suppress(OSError):
            for part in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0"):
                if part.startswith(f"{flag}="):
                    return part.partition("=")[2]
    raise LookupError(f"no process below {root_pid} was started with {flag}")


def _tree(root_pid: int) -> list[int]:
    found = [root_pid]
    for pid in found:
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            # A thread may have ended since it was listed.
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found
