# SPDX-License-Identifier: Apache-2.0
"""Causal attention of a step's tokens over their requests' paged KV cache."""

from __future__ import annotations

from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.ops.dispatch import implementation
from wavetrain_kernels.ops.kv_cache import check_cache

__all__ = ["AttentionMetadata", "paged_attention"]

# T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension.


def paged_attention(
    query: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Returns [T, Hq, D]: every query [T, Hq, D] attends to its request's keys up to and including its own position.

    This step's keys and values must be in the cache already. Query head h reads key-value head h // (Hq // Hkv). What
    lies in a block past a row's context never matters, not even NaN. Keys and values of a quantized cache are
    multiplied by their scales.

    Args:
        scale: multiplies the scores; positive.
        sliding_window: a query at position p sees positions > p - sliding_window only.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) before the softmax.

    Raises:
        ShapeError: the tensors do not fit each other or the metadata, the block tables are too narrow for the
            longest context, or scale, sliding_window or soft_cap is not positive.
        DtypeError: the query is not floating-point, or the cache neither of its dtype nor quantized.
    """
    if query.dim() != 3 or query.shape[0] != metadata.num_tokens:
        raise ShapeError(f"query must be [T, Hq, D] with T = {metadata.num_tokens}, got {list(query.shape)}")
    if not query.is_floating_point():
        raise DtypeError(f"query must be floating point, got {query.dtype}")
    check_cache(cache, query)
    if query.shape[1] % cache.num_kv_heads:
        raise ShapeError(f"{query.shape[1]} query heads are not a multiple of {cache.num_kv_heads} key-value heads")
    if metadata.max_seq_len > metadata.block_tables.shape[1] * cache.block_size:
        raise ShapeError(
            f"block_tables with {metadata.block_tables.shape[1]} columns of {cache.block_size} tokens "
            f"cannot hold a context of {metadata.max_seq_len}"
        )
    if not scale > 0:
        raise ShapeError(f"scale must be positive, got {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ShapeError(f"sliding_window must be at least 1, got {sliding_window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ShapeError(f"soft_cap must be positive, got {soft_cap}")
    kernels = implementation(query.device)
    out = kernels.empty(query.shape, query.dtype, query.device)
    kernels.paged_attention(out, query, cache, metadata, scale, sliding_window, soft_cap)
    return out
