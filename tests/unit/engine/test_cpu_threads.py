# SPDX-License-Identifier: Apache-2.0
"""One thread for each core the process has to itself: hyperthreads, affinity, control groups, a flag."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wavetrain_engine.worker.cpu_threads import num_usable_cores, set_cpu_threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class TestUsableCores:
    @pytest.fixture(autouse=True)
    def eight_threads_on_four_cores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
        for cpu in range(8):
            siblings = f"{cpu % 4},{cpu % 4 + 4}\n"
            write(tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list", siblings)

    def count(self, tmp_path: Path) -> int:
        return num_usable_cores(tmp_path / "proc", tmp_path / "cgroup", tmp_path / "cpu")

    def test_hyperthreads_count_once(self, tmp_path: Path) -> None:
        assert self.count(tmp_path) == 4

    def test_only_what_the_process_may_run_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 4})
        assert self.count(tmp_path) == 2

    def test_without_a_topology_every_processor_is_a_core(self, tmp_path: Path) -> None:
        (tmp_path / "cpu/cpu3/topology/thread_siblings_list").unlink()
        assert self.count(tmp_path) == 8

    @pytest.mark.parametrize(
        ("limit", "cores"),
        [("max 100000", 4), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
    )
    def test_version_2(self, tmp_path: Path, limit: str, cores: int) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/job\n")
        write(tmp_path / "cgroup/job/cpu.max", limit + "\n")
        assert self.count(tmp_path) == cores

    def test_the_tightest_of_nested_groups(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/slice/job\n")
        write(tmp_path / "cgroup/slice/cpu.max", "200000 100000\n")
        write(tmp_path / "cgroup/slice/job/cpu.max", "400000 100000\n")
        assert self.count(tmp_path) == 2

    @pytest.mark.parametrize(("quota", "cores"), [(-1, 4), (300000, 3)])
    def test_version_1(self, tmp_path: Path, quota: int, cores: int) -> None:
        write(tmp_path / "proc/self/cgroup", "4:memory:/other\n2:cpu,cpuacct:/docker/abc\n0::/\n")
        write(tmp_path / "cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
        write(tmp_path / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
        assert self.count(tmp_path) == cores


def test_this_machine_s() -> None:
    assert 1 <= num_usable_cores() <= len(os.sched_getaffinity(0))


class TestSetThreads:
    @pytest.fixture(autouse=True)
    def as_before(self) -> Iterator[None]:
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    def test_a_request_decides(self) -> None:
        assert (set_cpu_threads(3), torch.get_num_threads()) == (3, 3)

    def test_without_one_a_smaller_number_stays(self) -> None:
        torch.set_num_threads(1)
        assert (set_cpu_threads(None), torch.get_num_threads()) == (1, 1)

    def test_without_one_there_are_no_more_than_cores(self) -> None:
        torch.set_num_threads(500)
        assert set_cpu_threads(None) == torch.get_num_threads() == num_usable_cores()
