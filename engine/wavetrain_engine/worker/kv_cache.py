# SPDX-License-Identifier: Apache-2.0
"""The tensors behind the block tables: one key and one value cache per layer."""

from __future__ import annotations

import numpy as np
import torch

from wavetrain_engine.layers.attention import KVCache, KVCacheSpec


def allocate_kv_caches(spec: KVCacheSpec, num_blocks: int, block_size: int, device: torch.device) -> list[KVCache]:
    """Allocates zeroed caches [num_blocks, num_kv_heads, block_size, head_dim], one pair per layer.

    Zeroed only to be the same in every run: attention never looks at what nobody wrote (docs/decisions/0002).
    """
    shape = spec.shape(num_blocks, block_size)
    return [
        KVCache(key=_zeros(shape, spec.dtype, device), value=_zeros(shape, spec.dtype, device))
        for _ in range(spec.num_layers)
    ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page at once; calloc'ed pages come zeroed from the kernel when first
    # touched, so a 4 GiB cache costs nothing until it is used.
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
