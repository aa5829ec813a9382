# SPDX-License-Identifier: Apache-2.0
"""Causal attention over the paged KV cache; bfloat16, over a cache of the same or in 8 bits.

Other dtypes, and heads over 256 wide, go to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.cpu.kv_cache import cache_arguments
from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.reference import attention as reference

# Sizes and limits of source/attention.h.
_MAX_HEAD_DIM = 256
_PLAN_BYTES, _UNIT_BYTES, _SUMS_BYTES = 64, 64, 64 + 64 + 16 * _MAX_HEAD_DIM * 4
_LANES_PER_UNIT, _UNITS_PER_THREAD, _PARTITION = 64, 4, 1024


class AttentionKernels:
    """The attention function of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def paged_attention(
        self,
        out: Tensor,
        query: Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> None:
        """out [T, Hq, D] = attention of query [T, Hq, D] over the cache."""
        num_tokens, num_heads, head_dim = query.shape
        if query.dtype != torch.bfloat16 or head_dim > _MAX_HEAD_DIM:
            reference.paged_attention(out, query, cache, metadata, scale, sliding_window, soft_cap)
            return
        if not num_tokens:
            return
        if query.stride(2) != 1 or query.stride(1) != head_dim:
            query = query.contiguous()
        num_kv_heads = cache.num_kv_heads
        tables = metadata.block_tables
        num_units = num_kv_heads * (metadata.num_requests + num_tokens * num_heads // num_kv_heads // _LANES_PER_UNIT)
        scarce = min(num_units, _UNITS_PER_THREAD * torch.get_num_threads())
        num_pieces = scarce * -(-metadata.max_seq_len // _PARTITION)
        self._library.paged_attention(
            out.data_ptr(),
            query.data_ptr(),
            *cache_arguments(cache),
            metadata.query_start_loc.data_ptr(),
            metadata.seq_lens.data_ptr(),
            tables.data_ptr(),
            self._library.scratch(_PLAN_BYTES + num_pieces * (_SUMS_BYTES + _UNIT_BYTES) + num_units * _UNIT_BYTES),
            query.stride(0),
            tables.stride(0),
            metadata.num_requests,
            num_heads,
            num_kv_heads,
            head_dim,
            cache.block_size,
            sliding_window or 0,
            num_tokens,
            num_pieces,
            scale,
            soft_cap or 0.0,
        )
