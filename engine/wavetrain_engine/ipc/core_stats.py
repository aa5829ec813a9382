# SPDX-License-Identifier: Apache-2.0
"""Reading a running core's counters from outside: `python -m wavetrain_engine.ipc.core_stats RUNTIME_DIR`.

The reader says no Hello, so it is no client: it keeps no core alive and is not watched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from wavetrain_engine.errors import EngineDead
from wavetrain_engine.ipc.frames import GetStats, Stats, decode_core_frame, encode
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.stats import EngineStats


def read_stats(runtime_dir: RuntimeDir, timeout_s: float = 5.0) -> EngineStats:
    """Asks the core of this folder for its counters.

    Raises:
        EngineDead: none runs, or it does not answer in time (while it loads, it does not).
    """
    core_pid = runtime_dir.running_core()
    if core_pid is None:
        raise EngineDead("no engine core runs here")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.connect(runtime_dir.socket_address(core_pid))
        dealer.send(encode(GetStats(ticket=0)))
        while dealer.poll(int(timeout_s * 1000)):
            frame = decode_core_frame(dealer.recv())
            if isinstance(frame, Stats):
                return frame.stats
        raise EngineDead("the engine core does not answer")
    finally:
        context.destroy(linger=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counters as JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="wavetrain_engine.ipc.core_stats", description=__doc__, allow_abbrev=False)
    parser.add_argument("runtime_dir", type=Path, help="a folder of the server, under wavetrain-<uid> in TMPDIR")
    options = parser.parse_args(arguments)
    try:
        stats = read_stats(RuntimeDir(options.runtime_dir))
    except EngineDead as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(stats).decode("utf-8") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
