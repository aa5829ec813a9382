# SPDX-License-Identifier: Apache-2.0
"""Where Linux keeps the limits of this process: the folders of its control groups, of both versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def group_folders(controller: str, proc: Path = PROC, cgroup: Path = CGROUP) -> Iterator[tuple[int, Path]]:
    """Yields (version, folder) of the process's own group and each one above it; none needs to exist.

    Args:
        controller: `memory` or `cpu`: version 1 has a tree for each, version 2 one for all.
    """
    for line in read_text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroup / controller if controllers else cgroup
        group = root / path.strip("/")
        # In a container the path may be the host's and not be there; its own group is the root then.
        for folder in [group, *group.parents]:
            yield (1 if controllers else 2), folder
            if folder == root:
                break


def read_text(path: Path) -> str:
    """Returns what is in a file; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
