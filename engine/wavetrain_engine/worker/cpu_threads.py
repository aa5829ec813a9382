# SPDX-License-Identifier: Apache-2.0
"""How many threads compute on the CPU: as many as a flag says, else one for each core this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from wavetrain_engine.worker.control_groups import CGROUP, PROC, group_folders, read_text

_SYS_CPU = Path("/sys/devices/system/cpu")


def set_cpu_threads(requested: int | None) -> int:
    """Decides for the calling thread and those to come, and returns how many there are.

    To be called in the thread that computes, before it does. Without a request it is never more than torch has chosen:
    a number that OMP_NUM_THREADS asks for stays.
    """
    num_threads = requested or min(torch.get_num_threads(), num_usable_cores())
    torch.set_num_threads(num_threads)
    return num_threads


def num_usable_cores(proc: Path = PROC, cgroup: Path = CGROUP, sys_cpu: Path = _SYS_CPU) -> int:
    """Cores this process may run on, hyperthreads counted once: two threads of one core only share its units.

    A control group's share of processor time counts in whole cores: threads that wait for each other many times a step
    all stand still as soon as one has used its time up.
    """
    return max(1, min([_num_allowed_cores(sys_cpu), *(int(share) for share in _group_shares(proc, cgroup))]))


def _num_allowed_cores(sys_cpu: Path) -> int:
    usable = os.sched_getaffinity(0)
    cores = {read_text(sys_cpu / f"cpu{cpu}/topology/thread_siblings_list") for cpu in usable}
    return len(usable) if "" in cores else len(cores)


def _group_shares(proc: Path, cgroup: Path) -> Iterator[float]:
    """Processors' worth of time that this process's control group and each one above it may use."""
    for version, folder in group_folders("cpu", proc, cgroup):
        if version == 2:
            numbers = read_text(folder / "cpu.max").split()
        else:
            numbers = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):  # else `max`, or -1
            yield int(numbers[0]) / int(numbers[1])
