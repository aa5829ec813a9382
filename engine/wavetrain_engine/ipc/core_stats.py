# SPDX-License-Identifier: Apache-2.0
"""Reading a running core's counters from outside: `python -m wavetrain_engine.ipc.core_stats RUNTIME_DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from wavetrain_engine.errors import EngineDead
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.ipc.stats_reader import StatsReader
from wavetrain_engine.stats import EngineStats


def read_stats(runtime_dir: RuntimeDir, timeout_s: float = 5.0) -> EngineStats:
    """Asks the core of this folder for its counters.

    Raises:
        EngineDead: none runs, or it does not answer in time (while it loads, it does not).
    """
    core_pid = runtime_dir.running_core()
    if core_pid is None:
        raise EngineDead("no engine core runs here")
    try:
        reader = StatsReader(runtime_dir.socket_path(core_pid))
    except OSError:
        raise EngineDead("the engine core does not listen yet") from None
    try:
        stats = reader.read(timeout_s)
    finally:
        reader.close()
    if stats is None:
        raise EngineDead("the engine core does not answer")
    return stats


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
