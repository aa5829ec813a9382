# SPDX-License-Identifier: Apache-2.0
"""Attention of rows with few queries (decodes, checks of draft tokens) over the paged KV cache, at memory speed.

The work is every row's context, cut into tiles of TILE_N keys and laid end to end, once per key-value head. A fixed
number of programs per head share it in equal runs of tiles, whatever the rows' lengths: a run may end inside one row
and go through several. So the grid is a constant of the device, as a captured graph needs, no program idles while
another works on a long context, and all of them are on the device at once. Programs find their run from the lengths on
the device. A row that is whole in one run is written at once; the parts of others are merged by their log-sum-exp:
by the last of their programs to finish, or by a second kernel where there is much to merge.

The division is that of Stream-K (Osama et al. 2023, section 4), which Lean Attention (Sanovar et al. 2024) brought to
attention; the sums are those of online softmax (Milakov and Gimelshein 2018); that the query heads of a key-value head
are the rows of one matrix product is as in FlashInfer (Ye et al. 2025, section 3).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.attention_decode_config import (
    MAX_DECODE_QUERY_LEN,
    MAX_REGISTERS,
    DecodeConfig,
    DecodeShape,
    decode_config,
)
from wavetrain_kernels.gpu.attention_merge import (
    LOWEST,
    MAX_QUERY_LEN,
    launch_merge,
    merge_case,
    merge_constants,
    merge_parts,
    store_rows,
)
from wavetrain_kernels.gpu.kv_cache import (
    QUANTIZED_TYPES,
    archs_of,
    cache_signature,
    codes_to_read,
    load_scales,
    scale_scores,
    scale_values,
    scale_weights,
    widen_codes,
)
from wavetrain_kernels.gpu.launch import H200, KIB, DeviceTraits, device_traits, launch
from wavetrain_kernels.gpu.tuning import tuned
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.kv_cache import KVCache

# B = rows, T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension, P = programs per head.
# A row of BLOCK_M is one query head of one token: m = token * GROUP + head within its group.

# A window that hides nothing: longer than any context, and positions minus it do not overflow.
NO_WINDOW = 1 << 30

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _first_key(query_len, seq_len, sliding_window):
    """The position of a row's context where its first query's window begins."""
    return tl.maximum(seq_len - query_len - sliding_window + 1, 0)


@triton.jit
def _num_tiles(query_len, seq_len, sliding_window, TILE_N: tl.constexpr):
    """How many tiles a row is for these kernels. An empty context counts one, so that somebody writes its zeros."""
    is_own = (query_len > 0) & (query_len <= MAX_QUERY_LEN)
    tiles = tl.cdiv(seq_len, TILE_N) - _first_key(query_len, seq_len, sliding_window) // TILE_N
    return tl.where(is_own, tl.maximum(tiles, 1), 0)


@triton.jit
def _program_of(tile, num_tiles, num_active):
    """Which program has a tile, where the p-th one's tiles end before (p + 1) * num_tiles // num_active."""
    return (((tile + 1).to(tl.int64) * num_active - 1) // num_tiles).to(tl.int32)


@triton.jit
def _load_kv_tile(
    cache_ptr, block_ids, positions, dims, is_wanted, stride_cb,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys or values of positions [TILE_N] as [TILE_N, BLOCK_D] of the computing dtype; zero where not wanted.

    The zeros matter: what lies in a slot past the context, or before the window, may be NaN. Of a quantized
    cache these are the codes, whose scales are yet to come.
    """
    offsets = block_ids.to(tl.int64)[:, None] * stride_cb + (positions % BLOCK_SIZE)[:, None] * HEAD_DIM
    is_wanted = is_wanted[:, None]
    if BLOCK_D != HEAD_DIM:
        is_wanted = is_wanted & (dims < HEAD_DIM)[None, :]
    return widen_codes(tl.load(cache_ptr + offsets + dims[None, :], mask=is_wanted, other=0.0), DTYPE)


# The last three pointers are slices of what the runner sends in one piece: aligned to nothing.
@triton.jit(
    do_not_specialize=["num_rows", "sliding_window", "stride_bt"],
    do_not_specialize_on_alignment=["table_ptr", "query_start_ptr", "seq_len_ptr"],
)
def _decode_kernel(
    out_ptr,  # [T, Hq, D]
    part_ptr,  # [P, 2, Hkv, BLOCK_M, D] float32, each divided by its sum; of a program's two, the second begins a row
    lse_ptr,  # [P, 2, Hkv, BLOCK_M] float32, log2 of the sum of exp2 of the scores
    span_ptr,  # [B, Hkv, 2] int32, first and last program of a row
    arrived_ptr,  # [B, Hkv] int32, how many parts of a row are written; zero between launches
    query_ptr,  # [T, Hq, D]
    key_ptr,  # [num_blocks, Hkv, block_size, D]
    value_ptr,
    key_scale_ptr,  # [num_blocks, Hkv, block_size] of a quantized cache, or None
    value_scale_ptr,
    table_ptr,  # [B, max_blocks] int32
    query_start_ptr,  # [B + 1] int32
    seq_len_ptr,  # [B] int32
    scale,
    soft_cap,
    sliding_window,
    num_rows,
    stride_ot, stride_oh, stride_qt, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_bt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE_N: tl.constexpr, BLOCK_B: tl.constexpr,
    MIN_TILES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, MERGES: tl.constexpr, MERGE_M: tl.constexpr,
    MERGE_P: tl.constexpr,
):  # fmt: skip
    """One run of tiles of one key-value head. Neighbouring programs read neighbouring heads of the same blocks."""
    kv_head, program = tl.program_id(0), tl.program_id(1)
    num_kv_heads, num_programs = tl.num_programs(0), tl.num_programs(1)
    all_rows = tl.arange(0, BLOCK_B)
    begins = tl.load(query_start_ptr + all_rows, mask=all_rows < num_rows, other=0)
    ends = tl.load(query_start_ptr + all_rows + 1, mask=all_rows < num_rows, other=0)
    seq_lens = tl.load(seq_len_ptr + all_rows, mask=all_rows < num_rows, other=0)
    row_ends = tl.cumsum(_num_tiles(ends - begins, seq_lens, sliding_window, TILE_N), 0)
    num_tiles = tl.max(row_ends, 0)
    num_active = tl.minimum(num_programs, tl.maximum(num_tiles // MIN_TILES, 1))
    tile = (program.to(tl.int64) * num_tiles // num_active).to(tl.int32)
    run_end = ((program + 1).to(tl.int64) * num_tiles // num_active).to(tl.int32)
    run_end = tl.where(program < num_active, run_end, tile)

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, TILE_N)
    to_log2 = 1.0 if HAS_SOFT_CAP else scale * _LOG2_E
    while tile < run_end:
        is_before = row_ends <= tile
        row = tl.sum(is_before.to(tl.int32), 0)
        row_begin = tl.max(tl.where(is_before, row_ends, 0), 0)
        first_token = tl.load(query_start_ptr + row)
        query_len = tl.load(query_start_ptr + row + 1) - first_token
        seq_len = tl.load(seq_len_ptr + row)
        row_end = row_begin + _num_tiles(query_len, seq_len, sliding_window, TILE_N)
        part_end = tl.minimum(run_end, row_end)
        # From the tile's number in the work to the position of its first key in the row's context.
        first_key = _first_key(query_len, seq_len, sliding_window)
        shift = first_key // TILE_N - row_begin
        begin, end = (tile + shift) * TILE_N, (part_end + shift) * TILE_N
        num_valid = query_len * GROUP
        own = seq_len - query_len + m // GROUP  # the query's position
        query_at = (first_token + m // GROUP).to(tl.int64) * stride_qt + (kv_head * GROUP + m % GROUP) * stride_qh
        is_query = (m < num_valid)[:, None] & (dims < HEAD_DIM)[None, :]
        query = tl.load(query_ptr + query_at[:, None] + dims[None, :], mask=is_query, other=0.0)

        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        table_row_ptr = table_ptr + row.to(tl.int64) * stride_bt
        # Blocks before the window may be others' by now.
        first_wanted = (begin + lane >= first_key) & (begin + lane < seq_len)
        # One tile ahead: the addresses of a tile's loads never wait for the table.
        block_ids = tl.load(table_row_ptr + (begin + lane) // BLOCK_SIZE, mask=first_wanted, other=0)
        for tile_begin in range(begin, end, TILE_N):
            positions = tile_begin + lane
            is_wanted = (positions >= first_key) & (positions < seq_len)
            key = _load_kv_tile(
                key_ptr + kv_head * stride_kh, block_ids, positions, dims, is_wanted, stride_kb,
                HEAD_DIM, BLOCK_SIZE, BLOCK_D, query.dtype,
            )  # fmt: skip
            value = _load_kv_tile(
                value_ptr + kv_head * stride_vh, block_ids, positions, dims, is_wanted, stride_vb,
                HEAD_DIM, BLOCK_SIZE, BLOCK_D, query.dtype,
            )  # fmt: skip
            scale_at = (block_ids.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
            key_scale, value_scale = load_scales(key_scale_ptr, value_scale_ptr, scale_at, is_wanted)
            ahead = positions + TILE_N
            block_ids = tl.load(table_row_ptr + ahead // BLOCK_SIZE, mask=ahead < seq_len, other=0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            scores = scale_scores(scores, key_scale, key_scale_ptr)
            if HAS_SOFT_CAP:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both infinities.
                grown = tl.exp2(scores * (2 * _LOG2_E * scale / soft_cap))
                scores = (soft_cap * _LOG2_E) * (1 - 2 / (grown + 1))
            is_seen = (positions[None, :] <= own[:, None]) & (positions[None, :] > own[:, None] - sliding_window)
            scores = tl.where(is_seen, scores, float("-inf"))
            # The scale is positive: it may come after the maximum, as a multiply-add in the exponent.
            new_peak = tl.maximum(peak, tl.max(scores, 1) * to_log2)
            weights = tl.exp2(scores * to_log2 - new_peak[:, None])
            kept = tl.exp2(peak - new_peak)
            total = total * kept + tl.sum(weights, 1)
            weights = scale_weights(weights, value_scale, value_scale_ptr, query.dtype)
            value = scale_values(value, value_scale, value_scale_ptr)
            acc = tl.dot(weights.to(value.dtype), value, acc * kept[:, None], input_precision="ieee")
            peak = new_peak

        divisor = tl.where(total > 0, total, 1.0)
        acc = acc / divisor[:, None]
        first_program = _program_of(row_begin, num_tiles, num_active)
        last_program = _program_of(row_end - 1, num_tiles, num_active)
        if not MERGES:
            span_at = span_ptr + (row * num_kv_heads + kv_head) * 2
            tl.store(span_at, first_program, mask=program == first_program)
            tl.store(span_at + 1, last_program, mask=program == first_program)
        if first_program == last_program:
            store_rows(out_ptr, acc, m, dims, first_token, kv_head, num_valid, stride_ot, stride_oh, GROUP, HEAD_DIM)
        else:
            slot = (2 * program + (program == first_program).to(tl.int32)) * num_kv_heads + kv_head
            at = slot * BLOCK_M + m
            tl.store(lse_ptr + at, tl.where(total > 0, peak + tl.log2(divisor), float("-inf")), mask=m < num_valid)
            tl.store(part_ptr + at[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_query)
            if MERGES:
                tl.debug_barrier()  # all threads' stores come before the count
                arrived_at = arrived_ptr + row * num_kv_heads + kv_head
                if tl.atomic_add(arrived_at, 1, sem="acq_rel") == last_program - first_program:
                    for row_block in range(tl.cdiv(num_valid, MERGE_M)):
                        merge_parts(
                            out_ptr, part_ptr, lse_ptr, row_block, first_token, num_valid, first_program, last_program,
                            kv_head, num_kv_heads, stride_ot, stride_oh,
                            GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, MERGE_M, MERGE_P,
                        )  # fmt: skip
                    tl.store(arrived_at, 0)
        tile = part_end


def decode_attention(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """Writes the attention of all rows with 1 to MAX_DECODE_QUERY_LEN queries; tokens of other rows are left alone.

    A row of an empty context, the padding of a captured graph, gets zeros if it has queries. Of the metadata's host
    numbers only `max_query_len` is used, up to MAX_DECODE_QUERY_LEN: a constant of a graph. The tensors are dense in
    their last dimension, the caches in the last two.
    """
    num_rows = metadata.seq_lens.shape[0]
    if num_rows == 0 or query.shape[0] == 0:
        return
    shape = DecodeShape(
        num_rows=num_rows,
        max_query_len=min(metadata.max_query_len, MAX_DECODE_QUERY_LEN),
        num_heads=query.shape[1],
        num_kv_heads=cache.num_kv_heads,
        head_dim=query.shape[2],
        element_bytes=cache.key.element_size(),
        scales_values=cache.is_quantized and query.dtype == torch.float16,
    )
    config = _config(shape, query.device)
    run(out, query, cache, metadata, scale, sliding_window, soft_cap, shape, config)


@functools.cache
def _config(shape: DecodeShape, device: torch.device) -> DecodeConfig:
    return decode_config(shape, device_traits(device), tuned("decode_attention", shape.tuning_key, device))


def run(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    shape: DecodeShape,
    config: DecodeConfig,
) -> None:
    """Does what `decode_attention` does, as the configuration says: for the tuner and tests, which bring their own."""
    device, num_kv_heads = query.device, shape.num_kv_heads
    part_shape = (config.num_programs, 2, num_kv_heads, config.block_m)
    parts = workspace("decode_attention.parts", (*part_shape, shape.head_dim), torch.float32, device)
    part_lse = workspace("decode_attention.lse", part_shape, torch.float32, device)
    spans = workspace("decode_attention.spans", (shape.num_rows, num_kv_heads, 2), torch.int32, device)
    arrived = workspace("decode_attention.arrived", (shape.num_rows, num_kv_heads), torch.int32, device)
    launch(
        _decode_kernel,
        (num_kv_heads, config.num_programs),
        out,
        parts,
        part_lse,
        spans,
        arrived,
        query,
        *codes_to_read(cache),
        cache.key_scale,
        cache.value_scale,
        metadata.block_tables,
        metadata.query_start_loc,
        metadata.seq_lens,
        scale,
        1.0 if soft_cap is None else soft_cap,
        NO_WINDOW if sliding_window is None else sliding_window,
        shape.num_rows,
        *out.stride()[:2],
        *query.stride()[:2],
        *cache.key.stride()[:2],
        *cache.value.stride()[:2],
        metadata.block_tables.stride(0),
        **_decode_constants(shape, config, cache.block_size, soft_cap is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
    )
    if not config.merges:
        launch_merge(out, parts, part_lse, spans, metadata.query_start_loc, shape, config)


def _decode_constants(shape: DecodeShape, config: DecodeConfig, block_size: int, has_soft_cap: bool) -> dict[str, Any]:
    return merge_constants(shape, config) | {
        "BLOCK_SIZE": block_size,
        "TILE_N": config.tile_n,
        "BLOCK_B": config.block_b,
        "MIN_TILES": config.min_tiles,
        "HAS_SOFT_CAP": has_soft_cap,
        "MERGES": config.merges,
    }


# Where fewer stages fit than on an H200.
_A100 = DeviceTraits("NVIDIA A100", (8, 0), 108, 163 * KIB, 40 * KIB * KIB)

# (head_dim, query heads, key-value heads, soft cap) of families that we serve, and one of odd sizes.
_AOT_SHAPES = (
    (64, 32, 8, False),  # Llama 3.2 1B
    (64, 14, 2, False),  # Qwen 2.5 0.5B
    (80, 32, 32, False),  # Phi 2
    (96, 32, 32, False),  # Phi 3 mini
    (128, 32, 8, False),  # Llama 3.1 8B
    (128, 28, 4, False),  # Qwen 2.5 7B
    (128, 40, 8, False),  # Qwen 2.5 14B
    (128, 8, 1, False),  # Llama 3.1 70B on eight devices
    (128, 64, 4, False),  # Qwen 3 235B A22B
    (128, 32, 16, True),  # Gemma 2 27B
    (256, 16, 8, True),  # Gemma 2 9B
    (256, 8, 1, False),  # Gemma 2B
)


def aot_cases() -> Iterator[AotCase]:
    """Shapes of the families, without and with drafts to check; both block sizes and types, small and large batches."""
    for head_dim, num_heads, num_kv_heads, has_soft_cap in _AOT_SHAPES:
        tiles: set[int] = set()
        for max_query_len in (1, 4, MAX_DECODE_QUERY_LEN):
            shape = DecodeShape(64, max_query_len, num_heads, num_kv_heads, head_dim, 2)
            block_m = decode_config(shape, H200).block_m
            if block_m not in tiles:
                yield from _aot_cases("bf16", shape, 16, has_soft_cap, H200)
            tiles.add(block_m)
    llama = DecodeShape(256, 1, 32, 8, 128, 2)
    checking = dataclasses.replace(llama, max_query_len=MAX_DECODE_QUERY_LEN)
    yield from _aot_cases("bf16", llama, 16, False, H200)
    yield from _aot_cases("bf16", llama, 32, False, H200)
    yield from _aot_cases("fp16", llama, 16, False, H200)
    yield from _aot_cases("fp16", checking, 32, False, H200)
    yield from _aot_cases("bf16", llama, 16, False, _A100)
    yield from _aot_cases("bf16", checking, 16, False, _A100)
    for codes in QUANTIZED_TYPES:
        # Every architecture is compiled for; the type is what a chip is given that has it, its bits what others are.
        device = _A100 if codes == "u8" else H200
        for head_dim, num_heads, num_kv_heads, has_soft_cap in _AOT_SHAPES[::4]:
            shape = DecodeShape(64, 1, num_heads, num_kv_heads, head_dim, 1)
            yield from _aot_cases("bf16", shape, 16, has_soft_cap, device, codes)
        quantized = dataclasses.replace(llama, element_bytes=1)
        yield from _aot_cases("fp16", dataclasses.replace(quantized, scales_values=True), 16, False, device, codes)
        yield from _aot_cases("bf16", dataclasses.replace(checking, element_bytes=1), 32, False, device, codes)


def _aot_cases(
    dtype: str,
    shape: DecodeShape,
    block_size: int,
    has_soft_cap: bool,
    device: DeviceTraits,
    codes: str | None = None,
) -> Iterator[AotCase]:
    config = decode_config(shape, device)
    name = (
        f"{dtype}/d{shape.head_dim}/g{shape.group}/m{config.block_m}/b{config.block_b}/block{block_size}"
        f"/stages{config.num_stages}{'/cap' if has_soft_cap else ''}{f'/{codes}' if codes else ''}"
    )
    signature = {"out_ptr": f"*{dtype}", "part_ptr": "*fp32", "lse_ptr": "*fp32", "span_ptr": "*i32"}
    signature |= dict.fromkeys(("arrived_ptr", "table_ptr", "query_start_ptr", "seq_len_ptr"), "*i32")
    signature["query_ptr"] = f"*{dtype}"
    pointers, constexprs = cache_signature(dtype, codes)
    signature |= {"scale": "fp32", "soft_cap": "fp32", "sliding_window": "i32", "num_rows": "i32", "stride_bt": "i32"}
    strides = ("ot", "oh", "qt", "qh", "kb", "kh", "vb", "vh")
    signature |= dict.fromkeys((f"stride_{name}" for name in strides), "i32:16")
    yield AotCase(
        name=f"decode_attention/{name}",
        kernel=_decode_kernel,
        signature=signature | pointers,
        constexprs=constexprs | _decode_constants(shape, config, block_size, has_soft_cap),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        is_decode=True,
        maxnreg=MAX_REGISTERS,
        archs=archs_of(codes),
    )
    if not config.merges and codes is None:
        yield merge_case(f"merge_attention/{name}", dtype, shape, config)
