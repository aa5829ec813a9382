# SPDX-License-Identifier: Apache-2.0
"""Runs a program that is killed by the kernel when its starter dies, however that happens.

Run as a script, with the standard library only: `python -I -S launcher.py PARENT_PID PROGRAM [ARGUMENT ...]`. It asks
for the signal (PR_SET_PDEATHSIG) and then becomes the program, so that the program keeps this process's id. It is a
script and no preexec_fn, because Python code between fork and exec may deadlock where there are threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Replaces this process by the program in `arguments[1:]`; returns only if the parent is gone already."""
    parent_pid = int(arguments[0])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the request; then the signal would never come.
    if os.getppid() == parent_pid:
        os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
