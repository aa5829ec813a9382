# SPDX-License-Identifier: Apache-2.0
"""Rotation of queries and keys on their way into the KV cache; bfloat16 and float32, the reference does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.cpu.kv_cache import MOST_QUANTIZED, cache_arguments
from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.reference import rotary as reference

# T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension.

# Of query, key and value, and of a cache that is not quantized; of the table.
_KINDS = {
    (torch.bfloat16, torch.bfloat16): 0,
    (torch.bfloat16, torch.float32): 1,
    (torch.float32, torch.float32): 2,
}


class RotaryKernels:
    """The rotation of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def rotate_and_cache(
        self,
        query_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        cos_sin_cache: Tensor,
        cache: KVCache,
        slot_mapping: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        eps: float,
    ) -> None:
        """query_out [T, Hq, D] = rotated query; the cache gets the rotated key and the value [T, Hkv, D]."""
        kind = _KINDS.get((query.dtype, cos_sin_cache.dtype))
        if kind is None or (cache.is_quantized and cache.head_dim > MOST_QUANTIZED):
            inputs = (query, key, value, positions, cos_sin_cache)
            reference.rotate_and_cache(query_out, *inputs, cache, slot_mapping, query_norm, key_norm, eps)
            return
        query, key, value = _whole_heads(query), _whole_heads(key), _whole_heads(value)
        positions, cos_sin_cache = positions.to(torch.int64).contiguous(), cos_sin_cache.contiguous()
        slot_mapping = slot_mapping.contiguous()
        num_tokens, num_heads, head_dim = query.shape
        self._library.rotate_and_cache(
            query_out.data_ptr(),
            query.data_ptr(),
            *query.stride()[:2],
            num_heads,
            key.data_ptr(),
            *key.stride()[:2],
            key.shape[1],
            value.data_ptr(),
            *value.stride()[:2],
            positions.data_ptr(),
            cos_sin_cache.data_ptr(),
            *cache_arguments(cache),
            slot_mapping.data_ptr(),
            None if query_norm is None else query_norm.contiguous().data_ptr(),
            None if key_norm is None else key_norm.contiguous().data_ptr(),
            num_tokens,
            head_dim,
            cos_sin_cache.shape[2],
            cache.block_size,
            eps,
            kind,
        )


def _whole_heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
