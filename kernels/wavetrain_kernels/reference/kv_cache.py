# SPDX-License-Identifier: Apache-2.0
"""Storing keys and values in the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes [T, Hkv, D] tensors to their slots of [num_blocks, Hkv, block_size, D] caches; slot -1 is skipped."""
    is_kept = slot_mapping >= 0
    if not is_kept.all():
        key, value, slot_mapping = key[is_kept], value[is_kept], slot_mapping[is_kept]
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    # Row (block, head, offset) of the cache seen as [num_blocks * Hkv * block_size, D].
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    first = slot_mapping + blocks * ((num_kv_heads - 1) * block_size)
    rows = first.unsqueeze(1) + torch.arange(num_kv_heads, device=key.device) * block_size
    key_cache.view(-1, head_dim)[rows] = key
    value_cache.view(-1, head_dim)[rows] = value
