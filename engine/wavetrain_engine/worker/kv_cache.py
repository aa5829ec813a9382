# SPDX-License-Identifier: Apache-2.0
"""The tensors behind the block tables: one key and one value cache per layer."""

from __future__ import annotations

import numpy as np
import torch

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model_config import ModelConfig


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


def allocate_kv_caches(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """Allocates zeroed caches [num_blocks, num_kv_heads, block_size, head_dim], one pair per layer.

    Zeroed, because attention multiplies masked values by a probability of 0, and 0 × NaN is NaN.
    """
    shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
    return [
        KVCache(key=_zeros(shape, dtype, device), value=_zeros(shape, dtype, device)) for _ in range(config.num_layers)
    ]


def clear_blocks(caches: list[KVCache], block_ids: list[int]) -> None:
    """Zeroes blocks, so that a NaN written to them cannot reach the next request that gets them."""
    for cache in caches:
        cache.key[block_ids] = 0
        cache.value[block_ids] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page at once; calloc'ed pages come zeroed from the kernel when first
    # touched, so a 4 GiB cache costs nothing until it is used.
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
