# SPDX-License-Identifier: Apache-2.0
"""Which kernel attends for which rows of a step: it depends on a row's own number of queries, and on nothing else.

Rows with up to MAX_DECODE_QUERY_LEN queries are limited by reading their context, and are shared out over the device by
`attention_decode`. Rows with more are limited by arithmetic, and are `attention_prefill`'s. In a mixed step both are
launched over all rows, and each leaves the other's alone: sorting rows on the host would wait for the device.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.gpu.attention_decode import decode_attention
from wavetrain_kernels.gpu.attention_decode_config import MAX_DECODE_QUERY_LEN
from wavetrain_kernels.gpu.attention_prefill import prefill_attention
from wavetrain_kernels.gpu.attention_prefill_config import PrefillShape, can_attend
from wavetrain_kernels.gpu.launch import TRITON_TYPES, device_traits, fall_back
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.reference import attention as reference


def paged_attention(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """out [T, Hq, D] = attention of query [T, Hq, D] over the cache.

    Of the host's numbers, a step that may be captured (no row has more than MAX_DECODE_QUERY_LEN queries) uses
    `max_query_len` alone.
    """
    options = (metadata, scale, sliding_window, soft_cap)
    has_chunks = metadata.max_query_len > MAX_DECODE_QUERY_LEN
    missing = _missing(query, cache, has_chunks)
    if missing is not None:
        fall_back("paged_attention", missing)
        reference.paged_attention(out, query, cache, *options)
        return
    query = query if query.stride(2) == 1 else query.contiguous()
    if has_chunks:
        prefill_attention(out, query, cache, *options, min_query_len=MAX_DECODE_QUERY_LEN + 1)
    if not has_chunks or _has_decodes(metadata):
        decode_attention(out, query, cache, *options)


def _missing(query: Tensor, cache: KVCache, has_chunks: bool) -> str | None:
    """Returns what there is no kernel for; None: there is one."""
    if query.dtype not in TRITON_TYPES:
        return f"{query.dtype}"
    if has_chunks:
        shape = PrefillShape(
            num_heads=query.shape[1],
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            block_size=cache.block_size,
            element_bytes=query.element_size(),
            is_quantized=cache.is_quantized,
        )
        if not _has_prefill(shape, query.device):
            return f"chunks of prompts in blocks of {cache.block_size} tokens"
    return None


@functools.cache
def _has_prefill(shape: PrefillShape, device: torch.device) -> bool:
    return can_attend(shape, device_traits(device))


def _has_decodes(metadata: AttentionMetadata) -> bool:
    """Whether a mixed step has rows for decode attention; derived once a step, like a plan of the reference."""
    found = metadata.plans.get(_has_decodes)
    if found is None:
        starts = metadata.host_query_start_loc
        found = any(0 < stop - start <= MAX_DECODE_QUERY_LEN for start, stop in pairwise(starts))
        metadata.plans[_has_decodes] = found
    return found
