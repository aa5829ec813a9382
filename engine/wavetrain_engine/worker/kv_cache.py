# SPDX-License-Identifier: Apache-2.0
"""The tensors behind the block tables: one key and one value cache per layer."""

from __future__ import annotations

from functools import partial

import torch

from wavetrain_engine.layers.attention import KVCache, KVCacheSpec
from wavetrain_kernels import ops


def allocate_kv_caches(spec: KVCacheSpec, num_blocks: int, block_size: int, device: torch.device) -> list[KVCache]:
    """Allocates zeroed caches [num_blocks, num_kv_heads, block_size, head_dim], one pair per layer.

    Zeroed only to be the same in every run: attention never looks at what nobody wrote (docs/decisions/0002).
    """
    shape = spec.shape(num_blocks, block_size)
    allocate = partial(ops.allocate_kv_cache, shape, spec.dtype, device)
    return [KVCache(key=allocate(), value=allocate()) for _ in range(spec.num_layers)]
