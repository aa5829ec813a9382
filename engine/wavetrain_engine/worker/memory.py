# SPDX-License-Identifier: Apache-2.0
"""How much memory there is, and so how many KV-cache blocks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from wavetrain_engine.config import CacheSection
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.worker.control_groups import CGROUP, PROC, group_folders, read_text

GIB = 2**30
# Without a budget the CPU cache takes a share of what is free: the machine runs other things too.
_CPU_SHARE = 0.4
_CPU_MOST_BYTES = 8 * GIB
# Block tables are int32.
_MOST_BLOCKS = 2**31 - 1


def num_kv_blocks(
    config: CacheSection, bytes_per_block: int, most_useful: int, device: torch.device, *, working_bytes: int = 0
) -> int:
    """Decides the number of KV-cache blocks after the weights are in place.

    Args:
        bytes_per_block: from `KVCacheSpec.bytes_per_block`.
        working_bytes: what else a GPU has to have room for while it computes.
        most_useful: blocks beyond which more cannot be used by running requests (max_num_seqs requests of
            max_model_len tokens); only an explicit flag asks for more.

    Raises:
        ConfigError: not one block fits, or not as many as a flag asks for; the message names the flag to change.
    """
    free_bytes = _free_bytes(device) - working_bytes
    if config.num_blocks is not None:
        _check_fits("--num-blocks", config.num_blocks, config.num_blocks * bytes_per_block, free_bytes)
        return config.num_blocks
    if config.kv_cache_memory is not None:
        num_blocks = min(config.kv_cache_memory // bytes_per_block, _MOST_BLOCKS)
        if num_blocks == 0:
            raise ConfigError(
                f"--kv-cache-memory {config.kv_cache_memory} holds no block; one takes {bytes_per_block} bytes"
            )
        _check_fits("--kv-cache-memory", config.kv_cache_memory, num_blocks * bytes_per_block, free_bytes)
        return num_blocks
    num_blocks = min(_usable_bytes(config, free_bytes, device) // bytes_per_block, most_useful, _MOST_BLOCKS)
    if num_blocks < 1:
        flag = "raise --gpu-memory-utilization" if device.type == "cuda" else "free some memory"
        raise ConfigError(
            f"no memory is left for the KV cache after the weights; {flag}, set --kv-cache-memory, or serve a "
            "smaller model"
        )
    return num_blocks


@contextmanager
def device_memory_needed(purpose: str, remedy: str) -> Generator[None]:
    """Says what a GPU's memory was too small for, and what to do.

    Raises:
        ConfigError: there was not enough of it inside.
    """
    try:
        yield
    except RuntimeError as error:
        # A capture that is cut short raises an error of its own on top.
        if not isinstance(error, torch.OutOfMemoryError) and not isinstance(error.__context__, torch.OutOfMemoryError):
            raise
        raise ConfigError(f"the GPU's memory is too small for {purpose}; {remedy}") from error


def measure_working_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Returns how much more device memory is held at a time while `run` runs than after it."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    working_bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()  # what it freed counts as free again
    return working_bytes


def _check_fits(flag: str, value: int, wanted_bytes: int, free_bytes: int) -> None:
    """Caches are touched as they fill, so without this a cache too large would end the process hours later."""
    if wanted_bytes > free_bytes:
        raise ConfigError(
            f"{flag} {value} asks for {wanted_bytes / GIB:.2f} GiB of KV cache, but {free_bytes / GIB:.2f} GiB are "
            "free after the weights; lower it"
        )


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()


def _usable_bytes(config: CacheSection, free_bytes: int, device: torch.device) -> int:
    if device.type == "cuda":
        total_bytes = torch.cuda.mem_get_info(device)[1]
        return int(free_bytes - (1 - config.gpu_memory_utilization) * total_bytes)
    return min(int(free_bytes * _CPU_SHARE), _CPU_MOST_BYTES)


def available_memory_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Memory that can be taken without swapping: the machine's, or a control group's if that is less."""
    available = _values(proc / "meminfo").get("MemAvailable:", 0) * 1024
    return max(0, min([available, *_group_free_bytes(proc, cgroup)]))


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Where one version of control groups keeps its numbers."""

    limit: str
    usage: str
    inactive_key: str


_FILES = {
    1: _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _GroupFiles("memory.max", "memory.current", "inactive_file"),
}


def _group_free_bytes(proc: Path, cgroup: Path) -> Iterator[int]:
    """What this process's control group and each one above it have left."""
    for version, folder in group_folders("memory", proc, cgroup):
        files = _FILES[version]
        limit, usage = read_text(folder / files.limit).strip(), read_text(folder / files.usage).strip()
        if limit.isdigit() and usage.isdigit():
            # The usage has the page cache in it; what of it is inactive goes before anything else does.
            yield int(limit) - int(usage) + _values(folder / "memory.stat").get(files.inactive_key, 0)


def _values(path: Path) -> dict[str, int]:
    """A file of lines `name number ...`."""
    rows = [line.split() for line in read_text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
