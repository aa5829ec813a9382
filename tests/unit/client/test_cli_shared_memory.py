# SPDX-License-Identifier: Apache-2.0
"""Regions of a killed server go with the next start; those of a living one stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from wavetrain_cli.shared_memory import SharedMemory


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_regions_go_when_the_server_has_ended(tmp_path: Path) -> None:
    memory = SharedMemory(tmp_path)
    (tmp_path / f"{memory.prefix}region").touch()
    (tmp_path / "wavetrain-other").touch()
    memory.remove_regions()
    assert names(tmp_path) == sorted([f"{memory.prefix}lock", "wavetrain-other"])
    memory.close()
    assert names(tmp_path) == ["wavetrain-other"]


def test_a_start_removes_what_killed_ones_left_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from wavetrain_cli.shared_memory import SharedMemory\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "memory = SharedMemory(folder)\n"
        "(folder / (memory.prefix + 'left')).touch()\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(names(tmp_path)) == 2
    living = SharedMemory(tmp_path)
    (tmp_path / f"{living.prefix}region").touch()
    later = SharedMemory(tmp_path)
    assert names(tmp_path) == sorted([f"{living.prefix}lock", f"{living.prefix}region", f"{later.prefix}lock"])
    later.close()
    living.close()
    assert names(tmp_path) == []
