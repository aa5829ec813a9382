# SPDX-License-Identifier: Apache-2.0
"""What the reference attention derives from a step's layout, once for all layers: groups of decodes, chunks, masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata

# R = rows of a group, N = blocks gathered per row, S = N * block_size.

# Decodes of a group gather at most this many tokens (one row may exceed it): bounds the copy of their KV.
_MAX_GROUP_TOKENS = 16384
# Rows of a group differ in blocks at most by this factor, unless they are short: bounds the padding.
_MAX_LENGTH_RATIO = 2
_SHORT_BLOCKS = 8
# Queries of a chunk taken together: bounds its scores and masks, and skips keys that none of them sees.
_MAX_CHUNK_QUERIES = 512


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan depends on besides the layout. Layers that differ in none of these share a plan."""

    num_kv_heads: int
    block_size: int
    sliding_window: int | None
    has_soft_cap: bool
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows with a single query, of like length.

    Attributes:
        token_ids: [R] which of the step's tokens; None where the group is all of them, in order.
        cache_rows: [R * Hkv * N] (block, head) rows of a cache, in the order row, head, block.
        stale_rows: which of the gathered R * Hkv * S tokens lie in a row's last block, past its context.
        bias: [R, 1, 1, S] 0 where the query sees the key, -inf elsewhere.
    """

    token_ids: Tensor | None
    cache_rows: Tensor
    stale_rows: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive queries of one row: the step's tokens [start, stop).

    Attributes:
        cache_rows: [Hkv * N] (block, head) rows of a cache, in the order head, block.
        num_skipped: gathered tokens of the first block that no query sees.
        num_keys: tokens after those that are keys; the rest is past the last query.
        first_query: position of the first query among the keys.
        is_plain_causal: queries and keys are the same tokens, and no window cuts.
    """

    start: int
    stop: int
    cache_rows: Tensor
    num_skipped: int
    num_keys: int
    first_query: int
    sliding_window: int | None
    is_plain_causal: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A step's rows, each in one group or in one or several chunks; rows without queries in none."""

    decodes: list[DecodeGroup]
    chunks: list[Chunk]


def make_plan(metadata: AttentionMetadata, key: PlanKey) -> AttentionPlan:
    """Derives the plan of a step."""
    decode_rows: list[int] = []
    chunks: list[Chunk] = []
    heads = torch.arange(key.num_kv_heads, device=metadata.block_tables.device)
    for row, (start, stop) in enumerate(pairwise(metadata.host_query_start_loc)):
        if stop - start == 1:
            decode_rows.append(row)
        elif stop > start:
            chunks += _chunks(metadata, key, row, heads)
    groups = _groups_of_like_length(metadata, key, decode_rows)
    return AttentionPlan([_decode_group(metadata, key, rows, heads) for rows in groups], chunks)


def _groups_of_like_length(metadata: AttentionMetadata, key: PlanKey, rows: list[int]) -> list[list[int]]:
    sizes = {row: _block_span(metadata.host_seq_lens[row], key) for row in rows}
    groups: list[list[int]] = []
    fewest = 0
    for row in sorted(rows, key=lambda row: sizes[row][1]):
        num_blocks = sizes[row][1]
        is_alike = num_blocks <= max(fewest * _MAX_LENGTH_RATIO, _SHORT_BLOCKS)
        if groups and is_alike and (len(groups[-1]) + 1) * num_blocks * key.block_size <= _MAX_GROUP_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
            fewest = num_blocks
    return [sorted(group) for group in groups]


def _block_span(seq_len: int, key: PlanKey) -> tuple[int, int]:
    """Returns the first block that the last token of a context sees, and how many from there to the end."""
    first = 0 if key.sliding_window is None else max(0, seq_len - key.sliding_window) // key.block_size
    return first, -(-seq_len // key.block_size) - first


def _decode_group(metadata: AttentionMetadata, key: PlanKey, rows: list[int], heads: Tensor) -> DecodeGroup:
    device, block_size = metadata.block_tables.device, key.block_size
    spans = [_block_span(metadata.host_seq_lens[row], key) for row in rows]
    num_columns = max(num_blocks for _, num_blocks in spans)
    row_ids = torch.tensor(rows, device=device)
    first, num_blocks = torch.tensor(spans, device=device)[:, :, None].unbind(1)  # [R, 1] each
    seq_lens = metadata.seq_lens.index_select(0, row_ids)[:, None]

    columns = torch.arange(num_columns, device=device).expand(len(rows), -1)
    # Padding repeats the row's own first block: never another row's content.
    table_columns = first + torch.where(columns < num_blocks, columns, 0)
    block_ids = metadata.block_tables.index_select(0, row_ids).gather(1, table_columns).long()
    cache_rows = block_ids[:, None, :] * key.num_kv_heads + heads[None, :, None]

    offsets = torch.arange(block_size, device=device)
    positions = first * block_size + torch.arange(num_columns * block_size, device=device)
    is_hidden = positions >= seq_lens
    if key.sliding_window is not None:
        is_hidden |= positions < seq_lens - key.sliding_window
    # By the block that was gathered, not the column it pads: the first block may be the unfilled last one too.
    is_stale = (table_columns[:, :, None] * block_size + offsets).flatten(1) >= seq_lens
    bias = torch.zeros(is_hidden.shape, dtype=key.dtype, device=device).masked_fill_(is_hidden, float("-inf"))
    is_all = len(rows) == metadata.num_tokens
    starts = [metadata.host_query_start_loc[row] for row in rows]
    return DecodeGroup(
        token_ids=None if is_all else torch.tensor(starts, device=device),
        cache_rows=cache_rows.flatten(),
        stale_rows=is_stale[:, None, :].expand(-1, key.num_kv_heads, -1).flatten().nonzero().squeeze(1),
        bias=bias[:, None, None, :],
    )


def _chunks(metadata: AttentionMetadata, key: PlanKey, row: int, heads: Tensor) -> Iterator[Chunk]:
    row_start, row_stop = metadata.host_query_start_loc[row : row + 2]
    num_context = metadata.host_seq_lens[row] - (row_stop - row_start)
    window = key.sliding_window
    is_plain = num_context == 0 and not key.has_soft_cap and (window is None or window >= row_stop - row_start)
    length = row_stop - row_start if is_plain else _MAX_CHUNK_QUERIES
    for start in range(row_start, row_stop, length):
        stop = min(start + length, row_stop)
        first_position = num_context + start - row_start
        end = first_position + stop - start
        first_key = 0 if window is None else max(0, first_position - window + 1)
        first_block = first_key // key.block_size
        block_ids = metadata.block_tables[row, first_block : -(-end // key.block_size)].long()
        yield Chunk(
            start=start,
            stop=stop,
            cache_rows=(block_ids[None, :] * key.num_kv_heads + heads[:, None]).flatten(),
            num_skipped=first_key - first_block * key.block_size,
            num_keys=end - first_key,
            first_query=first_position - first_key,
            sliding_window=window,
            is_plain_causal=is_plain,
        )
