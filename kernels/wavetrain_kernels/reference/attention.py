# SPDX-License-Identifier: Apache-2.0
"""Causal attention over the paged KV cache, from gathers and PyTorch's own fused attention.

Rows with one query (decodes) are computed together, in groups of like length; a row with more queries (a chunk of a
prompt) is computed alone. What depends on the step but not on the layer (`attention_plan.py`) is derived once and kept
in the metadata.

A position that a query must not see is masked in the scores, which is not enough: a stale NaN in its value would
survive a weight of zero (0 * NaN = NaN). So nothing but the row's own tokens is ever multiplied: chunks slice,
decodes repeat a block of their own as padding and overwrite the tail of their last block with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.reference.attention_plan import AttentionPlan, Chunk, DecodeGroup, PlanKey, make_plan
from wavetrain_kernels.reference.kv_cache import as_bytes, dequantize_heads

# T = tokens in the step, R = rows of a group, S = keys gathered per row, L = queries of a chunk, G = Hq // Hkv.


def paged_attention(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """out [T, Hq, D] = attention of query [T, Hq, D] over the cache, its keys and values in query's dtype."""
    key = PlanKey(cache.num_kv_heads, cache.block_size, sliding_window, soft_cap is not None, query.dtype)
    plan: AttentionPlan | None = metadata.plans.get(key)
    if plan is None:
        plan = metadata.plans[key] = make_plan(metadata, key)
    for group in plan.decodes:
        _attend_decodes(out, query, cache, group, scale, soft_cap)
    for chunk in plan.chunks:
        _attend_chunk(out, query, cache, chunk, scale, soft_cap)


def _attend_decodes(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    group: DecodeGroup,
    scale: float,
    soft_cap: float | None,
) -> None:
    num_kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    num_rows, num_keys = group.bias.shape[0], group.bias.shape[3]
    keys, values = _gather(cache, group.cache_rows, query.dtype)
    keys.index_fill_(0, group.stale_rows, 0.0)
    values.index_fill_(0, group.stale_rows, 0.0)
    queries = query if group.token_ids is None else query.index_select(0, group.token_ids)
    # The G query heads of a key-value head see the same keys: to the attention function they are G queries.
    queries = queries.reshape(num_rows, num_kv_heads, -1, head_dim)
    shape = (num_rows, num_kv_heads, num_keys, head_dim)
    attended = _attend(queries, keys.view(shape), values.view(shape), group.bias, scale, soft_cap)
    attended = attended.reshape(num_rows, -1, head_dim)
    if group.token_ids is None:
        out.copy_(attended)
    else:
        out.index_copy_(0, group.token_ids, attended)


def _attend_chunk(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    chunk: Chunk,
    scale: float,
    soft_cap: float | None,
) -> None:
    num_kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    num_queries = chunk.stop - chunk.start
    kept = slice(chunk.num_skipped, chunk.num_skipped + chunk.num_keys)
    gathered = _gather(cache, chunk.cache_rows, query.dtype)
    keys, values = (x.view(num_kv_heads, 1, -1, head_dim)[:, :, kept] for x in gathered)
    # Key-value heads as batch, their query heads as heads: keys are shared by a stride of 0, not by copies.
    queries = query[chunk.start : chunk.stop].transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)
    shape = (num_kv_heads, queries.shape[1], chunk.num_keys, head_dim)
    bias = None if chunk.is_plain_causal and soft_cap is None else _chunk_bias(chunk, query)
    attended = _attend(queries, keys.expand(shape), values.expand(shape), bias, scale, soft_cap)
    out[chunk.start : chunk.stop] = attended.reshape(-1, num_queries, head_dim).transpose(0, 1)


def _gather(cache: KVCache, cache_rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies (block, head) rows of a cache; returns keys and values [rows * block_size, D]."""
    return (
        _gather_heads(cache.key, cache.key_scale, cache_rows, dtype),
        _gather_heads(cache.value, cache.value_scale, cache_rows, dtype),
    )


def _gather_heads(heads: Tensor, scale: Tensor | None, cache_rows: Tensor, dtype: torch.dtype) -> Tensor:
    head_dim = heads.shape[3]
    rows = as_bytes(heads).view(-1, heads.shape[2] * head_dim).index_select(0, cache_rows).view(-1, head_dim)
    if scale is None:
        return rows
    scales = scale.view(-1, heads.shape[2]).index_select(0, cache_rows).view(-1)
    return dequantize_heads(rows.view(heads.dtype), scales, dtype)


def _chunk_bias(chunk: Chunk, query: Tensor) -> Tensor:
    """Returns [L, S]: 0 where a query sees a key, -inf elsewhere. Made anew in each layer: kept, it could be large."""
    positions = torch.arange(chunk.num_keys, device=query.device)
    own = torch.arange(chunk.first_query, chunk.first_query + chunk.stop - chunk.start, device=query.device)[:, None]
    is_hidden = positions > own
    if chunk.sliding_window is not None:
        is_hidden |= positions <= own - chunk.sliding_window
    return torch.zeros(is_hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(is_hidden, float("-inf"))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None
) -> Tensor:
    """Attention of [batch, heads, L, D] over [batch, heads, S, D]; causal from key 0 on where there is no bias."""
    if soft_cap is None or bias is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / soft_cap) * soft_cap + bias
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)
