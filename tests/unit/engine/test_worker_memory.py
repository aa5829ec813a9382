# SPDX-License-Identifier: Apache-2.0
"""How many blocks: from flags, from what is free, from control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wavetrain_engine.config import CacheSection
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.worker import memory
from wavetrain_engine.worker.memory import GIB, available_memory_bytes, num_kv_blocks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


@pytest.fixture(autouse=True)
def ten_gib_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 10 * GIB)


class TestNumBlocks:
    def test_a_share_of_what_is_free(self) -> None:
        assert num_kv_blocks(CacheSection(), MIB, 10**9, CPU) == int(10 * GIB * 0.4) // MIB

    def test_no_more_than_is_of_use(self) -> None:
        assert num_kv_blocks(CacheSection(), MIB, 100, CPU) == 100

    def test_no_more_than_a_desktop_would_spare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1000 * GIB)
        assert num_kv_blocks(CacheSection(), MIB, 10**9, CPU) == 8 * 1024

    def test_a_flag_may_ask_for_more_than_is_of_use(self) -> None:
        assert num_kv_blocks(CacheSection(num_blocks=200), MIB, 100, CPU) == 200
        assert num_kv_blocks(CacheSection(kv_cache_memory=200 * MIB + 5), MIB, 100, CPU) == 200

    def test_blocks_go_before_bytes(self) -> None:
        assert num_kv_blocks(CacheSection(num_blocks=7, kv_cache_memory=200 * MIB), MIB, 100, CPU) == 7

    @pytest.mark.parametrize(
        ("cache", "message"),
        [
            (CacheSection(kv_cache_memory=MIB - 1), "--kv-cache-memory 1048575 holds no block; one takes 1048576 b"),
            (CacheSection(kv_cache_memory=11 * GIB), r"--kv-cache-memory \d+ asks for 11.00 GiB .* 10.00 GiB are free"),
            (CacheSection(num_blocks=11 * 1024), "--num-blocks 11264 asks for 11.00 GiB .*; lower it"),
        ],
    )
    def test_a_flag_that_cannot_be_honoured(self, cache: CacheSection, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            num_kv_blocks(cache, MIB, 100, CPU)

    def test_nothing_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: MIB)
        with pytest.raises(ConfigError, match=r"no memory is left for the KV cache .* set --kv-cache-memory"):
            num_kv_blocks(CacheSection(), MIB, 100, CPU)

    def test_a_gpu_is_used_up_to_its_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
        assert num_kv_blocks(CacheSection(gpu_memory_utilization=0.5), MIB, 10**9, CUDA) == 20 * 1024
        with pytest.raises(ConfigError, match="raise --gpu-memory-utilization"):
            num_kv_blocks(CacheSection(gpu_memory_utilization=0.2), MIB, 10**9, CUDA)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class TestAvailable:
    @pytest.fixture
    def proc(self, tmp_path: Path) -> Path:
        write(tmp_path / "proc/meminfo", "MemTotal:       2000 kB\nMemAvailable:       1000 kB\nHugePages_Total: 0\n")
        return tmp_path / "proc"

    def test_the_machine_s(self, proc: Path, tmp_path: Path) -> None:
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 1000 * 1024

    def test_version_2(self, proc: Path, tmp_path: Path) -> None:
        write(proc / "self/cgroup", "0::/\n")
        write(tmp_path / "cgroup/memory.max", "600000\n")
        write(tmp_path / "cgroup/memory.current", "500000\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 100_000
        # Files that were read and lie about count as usage, and go first when room is needed.
        write(tmp_path / "cgroup/memory.stat", "anon 100000\ninactive_file 300000\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 400_000
        write(tmp_path / "cgroup/memory.max", "max\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 1000 * 1024

    def test_the_tightest_of_nested_groups(self, proc: Path, tmp_path: Path) -> None:
        write(proc / "self/cgroup", "0::/user.slice/job\n")
        for folder, limit in (("user.slice", 300_000), ("user.slice/job", 500_000)):
            write(tmp_path / "cgroup" / folder / "memory.max", f"{limit}\n")
            write(tmp_path / "cgroup" / folder / "memory.current", "100000\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 200_000

    def test_version_1(self, proc: Path, tmp_path: Path) -> None:
        write(proc / "self/cgroup", "9:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
        write(tmp_path / "cgroup/memory/memory.limit_in_bytes", "800000\n")
        write(tmp_path / "cgroup/memory/memory.usage_in_bytes", "500000\n")
        write(tmp_path / "cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 200000\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 500_000
        write(tmp_path / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 1000 * 1024

    def test_a_group_over_its_limit_has_nothing(self, proc: Path, tmp_path: Path) -> None:
        write(proc / "self/cgroup", "0::/\n")
        write(tmp_path / "cgroup/memory.max", "5\n")
        write(tmp_path / "cgroup/memory.current", "9\n")
        assert available_memory_bytes(proc, tmp_path / "cgroup") == 0

    def test_this_machine_s(self) -> None:
        assert available_memory_bytes() > 0
