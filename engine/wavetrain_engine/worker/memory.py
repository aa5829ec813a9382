# SPDX-License-Identifier: Apache-2.0
"""How much memory there is, and so how many KV-cache blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from wavetrain_engine.config import CacheSection
from wavetrain_engine.errors import ConfigError

GIB = 2**30
# Without a budget the CPU cache takes a share of what is free: the machine runs other things too.
_CPU_SHARE = 0.4
_CPU_MOST_BYTES = 8 * GIB


def num_kv_blocks(config: CacheSection, bytes_per_block: int, most_useful: int, device: torch.device) -> int:
    """Decides the number of KV-cache blocks after the weights are in place.

    Args:
        bytes_per_block: from `KVCacheSpec.bytes_per_block`.
        most_useful: blocks beyond which more cannot be used by running requests (max_num_seqs requests of
            max_model_len tokens); only an explicit flag asks for more.

    Raises:
        ConfigError: not one block fits; the message names the flag to change.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // bytes_per_block
        if num_blocks == 0:
            raise ConfigError(
                f"--kv-cache-memory {config.kv_cache_memory} holds no block; one takes {bytes_per_block} bytes"
            )
        return num_blocks
    free_bytes = _free_bytes(config, device)
    num_blocks = min(free_bytes // bytes_per_block, most_useful)
    if num_blocks < 1:
        raise ConfigError(
            "no memory is left for the KV cache after the weights; raise --gpu-memory-utilization, "
            "set --kv-cache-memory, or serve a smaller model"
        )
    return int(num_blocks)


def _free_bytes(config: CacheSection, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - config.gpu_memory_utilization) * total)
    return min(int(available_memory_bytes() * _CPU_SHARE), _CPU_MOST_BYTES)


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or the control group's if that is less."""
    available = _meminfo_bytes("MemAvailable")
    limit, current = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and current is not None:
        available = min(available, limit - current)
    return max(available, 0)


def _meminfo_bytes(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _cgroup_bytes(name: str) -> int | None:
    path = Path("/sys/fs/cgroup") / name
    text = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None
