# SPDX-License-Identifier: Apache-2.0
"""A model's process must not outlive its server.

Triton's own stub notices the death, but often cannot end: it waits for ever for the server to answer a log line or a
response, sometimes with the interpreter's lock held (both seen with 2.51). So the kernel is asked to kill this process
(PR_SET_PDEATHSIG), and until it can be, a thread waits for the server's end. Nothing is lost by leaving the hard way:
there is nobody left to answer, and the engine core watches the server itself.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from pathlib import Path

from wavetrain_engine.ipc.process_watch import ProcessWatch

_PR_SET_PDEATHSIG = 1
_POLL_INTERVAL_MS = 250


def exit_with_server(server_pid: int) -> None:
    """Ends this process as soon as its parent, the server, has ended. Call it while that one surely runs."""
    watch = ProcessWatch(server_pid)
    threading.Thread(target=_wait_and_exit, args=(watch,), name="server-watch", daemon=True).start()


def _wait_and_exit(watch: ProcessWatch) -> None:
    poll = select.poll()
    if (descriptor := watch.fileno()) is not None:
        poll.register(descriptor, select.POLLIN)
    is_armed = False
    while watch.is_alive():
        if not is_armed and _is_child_of_main_thread(watch.pid):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            is_armed = True  # and look once more whether the server died just before
        else:
            # Each look adds up the server's hundred threads, half a millisecond: none where the kernel tells us.
            poll.poll(None if is_armed and descriptor is not None else _POLL_INTERVAL_MS)
    os._exit(1)


def _is_child_of_main_thread(server_pid: int) -> bool:
    """Whether the kernel would take the end of the server for its signal.

    It sends the signal when the parent's *thread* ends. A thread that loads models starts us and ends soon after; its
    children then go over to the server's main thread, which ends last.
    """
    try:
        children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text(encoding="ascii")
    except OSError:  # the server is gone, or the kernel has no such file
        return False
    return str(os.getpid()) in children.split()
