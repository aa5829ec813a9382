# SPDX-License-Identifier: Apache-2.0
"""A model's process must not outlive its server.

Triton's own stub notices the death, but cannot end where it has told the server a log line or a metric since: it waits
for the answer for ever (seen with 2.51). So a thread waits for the server's end and leaves the hard way. Nothing is
lost by that: there is nobody left to answer, and the engine core watches the server itself.
"""

from __future__ import annotations

import os
import select
import threading
import time

from wavetrain_engine.ipc.process_watch import ProcessWatch

_POLL_INTERVAL_S = 0.5


def exit_with_server(server_pid: int) -> None:
    """Ends this process as soon as the one with `server_pid` has ended. Call it while that one surely runs."""
    watch = ProcessWatch(server_pid)
    threading.Thread(target=_wait_and_exit, args=(watch,), name="server-watch", daemon=True).start()


def _wait_and_exit(watch: ProcessWatch) -> None:
    descriptor = watch.fileno()
    if descriptor is not None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    while watch.is_alive():
        time.sleep(_POLL_INTERVAL_S)
    os._exit(1)
