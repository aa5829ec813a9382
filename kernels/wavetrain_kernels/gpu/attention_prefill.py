# SPDX-License-Identifier: Apache-2.0
"""Causal attention of chunks of prompts over the paged KV cache, at the speed of the matrix units.

A tile is BLOCK_M rows: the query heads of one key-value head (PACK of them) times as many consecutive tokens as fit, so
that a key or value that was brought into shared memory serves all of them, and a short chunk still fills its tile.
The grid is the tiles of all chunks, laid end to end, times the heads: nothing is padded to the longest chunk. A
program finds its chunk from the lengths on the device. The last tiles of a chunk, which have most keys to read, start
first, and the light ones fill the gaps at the end; neighbouring programs work on the heads of one tile, for balance.

The sums are those of online softmax (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023, section 3.1). The loop is
skewed by one tile, as in FlashAttention-3 (Shah et al. 2024, section 3.2): the product of weights and values of a tile
is started after the scores of the next one, and runs while those are turned into weights. Triton leaves a product
running if a later one that it waits for comes before the first use of the result; the assembler lets it run if nothing
else writes its registers meanwhile, and otherwise makes all products wait, for which a test looks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.attention_prefill_config import PrefillConfig, PrefillShape, prefill_config
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
from wavetrain_kernels.gpu.launch import H200, KIB, DeviceTraits, cdiv, device_traits, launch, next_power_of_2
from wavetrain_kernels.gpu.tuning import tuned
from wavetrain_kernels.kv_cache import KVCache

# B = rows, T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension.
# A row of BLOCK_M is one query head of one token: m = token * PACK + head.

_LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, yet finite: the difference of two of these is no NaN.
_LOWEST = tl.constexpr(-1e30)
# Rows of the step that a program looks through at once for the one that its tile belongs to.
_BLOCK_B = 256


@triton.jit
def _find_tile(query_start_ptr, tile, num_rows, TILE_TOKENS: tl.constexpr, MIN_QUERY_LEN: tl.constexpr, BLOCK_B):
    """The row whose tile this is, counted over all rows, and which of its tiles; a row past the last if it is none's.

    A running sum and not a search: the lengths come in one read, and rows that are not ours take no tile.
    """
    row = 0
    first_tile = 0
    num_before = 0
    for begin in range(0, num_rows, BLOCK_B):
        rows = begin + tl.arange(0, BLOCK_B)
        starts = tl.load(query_start_ptr + rows, mask=rows < num_rows, other=0)
        stops = tl.load(query_start_ptr + rows + 1, mask=rows < num_rows, other=0)
        query_lens = stops - starts
        tiles = tl.where(query_lens >= MIN_QUERY_LEN, tl.cdiv(query_lens, TILE_TOKENS), 0)
        tile_ends = num_before + tl.cumsum(tiles, 0)
        is_before = (tile_ends <= tile) & (rows < num_rows)
        row += tl.sum(is_before.to(tl.int32), 0)
        first_tile = tl.maximum(first_tile, tl.max(tl.where(is_before, tile_ends, 0), 0))
        num_before = tl.max(tile_ends, 0)
    return row, tile - first_tile


@triton.jit
def _load_kv_tile(slot_ptrs, block_ids, is_wanted, dims, BLOCK_STRIDE, HEAD_DIM, BLOCK_D, DTYPE):
    """Keys or values of BLOCK_N positions as [BLOCK_N, BLOCK_D] of the computing dtype; zero where not wanted.

    The zeros matter: what lies in a slot past the context may be NaN. Of a quantized cache these are the codes, whose
    scales are yet to come.
    """
    offsets = block_ids.to(tl.int64) * BLOCK_STRIDE
    is_wanted = is_wanted[:, None]
    if BLOCK_D != HEAD_DIM:
        is_wanted = is_wanted & (dims < HEAD_DIM)[None, :]
    return widen_codes(tl.load(slot_ptrs + offsets[:, None], mask=is_wanted, other=0.0), DTYPE)


@triton.jit
def _cap(scores, scale, soft_cap):
    """Scores after the soft cap, in units of log2 e. tanh(x) = 1 - 2 / (exp(2 x) + 1) is right at both infinities."""
    grown = tl.exp2(scores * (2 * _LOG2_E * scale / soft_cap))
    return (soft_cap * _LOG2_E) * (1 - 2 / (grown + 1))


@triton.jit
def _hide(scores, positions, own, sliding_window, HAS_WINDOW: tl.constexpr):
    """Scores, but -inf where the key at a position [BLOCK_N] is hidden from the query at a position [BLOCK_M]."""
    is_seen = positions[None, :] <= own[:, None]
    if HAS_WINDOW:
        is_seen = is_seen & (positions[None, :] > own[:, None] - sliding_window)
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit
def _hide_in_cut_tile(
    scores, positions, own, tile_begin, first_own, end, sliding_window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """The same, but without a look at the scores of a tile that every query sees whole, as most are."""
    is_cut = tile_begin + BLOCK_N > first_own + 1
    if HAS_WINDOW:
        is_cut = is_cut | (tile_begin < end - sliding_window)
    if is_cut:
        scores = _hide(scores, positions, own, sliding_window, HAS_WINDOW)
    return scores


@triton.jit(
    do_not_specialize=["sliding_window", "num_rows", "stride_bt"],
    do_not_specialize_on_alignment=["table_ptr", "query_start_ptr", "seq_len_ptr"],
)
def _prefill_kernel(
    out_ptr,  # [T, Hq, D]
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
    stride_ot, stride_oh, stride_qt, stride_qh, stride_qd, stride_bt,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MIN_QUERY_LEN: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, QUERY_IN_REGISTERS: tl.constexpr, IS_SKEWED: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """One tile of queries against all keys that any of them sees."""
    TILE_TOKENS: tl.constexpr = BLOCK_M // PACK
    HEAD_TILES: tl.constexpr = NUM_HEADS // PACK
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty  # pyright: ignore[reportAssignmentType]
    BITS: tl.constexpr = tl.int16 if query_ptr.dtype.element_ty.primitive_bitwidth == 16 else tl.int32  # pyright: ignore

    number = tl.program_id(0) // HEAD_TILES
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    row, tile = _find_tile(query_start_ptr, number, num_rows, TILE_TOKENS, MIN_QUERY_LEN, BLOCK_B)  # pyright: ignore
    if row >= num_rows:
        return
    first_head = (tl.program_id(0) % HEAD_TILES) * PACK
    kv_head = first_head // (NUM_HEADS // NUM_KV_HEADS)
    row_start = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - row_start
    num_before = tl.load(seq_len_ptr + row) - query_len  # tokens of the context that came before the chunk
    first_token = (tl.cdiv(query_len, TILE_TOKENS) - 1 - tile) * TILE_TOKENS  # within the chunk; heavy tiles first

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token = first_token + m // PACK
    head = first_head + m % PACK
    is_query = (m < TILE_TOKENS * PACK) & (token < query_len)
    is_element = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    query_at = (row_start + token).to(tl.int64) * stride_qt + head * stride_qh
    query_at = query_at[:, None] + dims[None, :] * stride_qd
    if QUERY_IN_REGISTERS:  # where Triton keeps an operand that it was given as bits
        query_bits = tl.load(query_ptr.to(tl.pointer_type(BITS), bitcast=True) + query_at, mask=is_element, other=0)
        query = query_bits.to(DTYPE, bitcast=True)
    else:
        query = tl.load(query_ptr + query_at, mask=is_element, other=0.0)

    # The keys that the tile sees are [begin, end); the first query's position is the first that not all see.
    own = num_before + token
    first_own = num_before + first_token
    end = num_before + tl.minimum(first_token + TILE_TOKENS, query_len)
    begin = tl.maximum(first_own - sliding_window + 1, 0) if HAS_WINDOW else 0
    first_begin = begin // BLOCK_N * BLOCK_N

    lane = tl.arange(0, BLOCK_N)
    in_block = (kv_head * BLOCK_SIZE + lane % BLOCK_SIZE)[:, None] * HEAD_DIM + dims[None, :]
    key_ptrs, value_ptrs = key_ptr + in_block, value_ptr + in_block
    column_ptrs = table_ptr + row.to(tl.int64) * stride_bt + lane // BLOCK_SIZE
    # The table is read one tile ahead: the addresses of a tile's loads never wait for it.
    is_wanted = (first_begin + lane >= begin) & (first_begin + lane < end)
    block_ids = tl.load(column_ptrs + first_begin // BLOCK_SIZE, mask=is_wanted, other=0)
    last_block_ids = block_ids

    to_log2 = 1.0 if HAS_SOFT_CAP else scale * _LOG2_E
    peak = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kept = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Carried to the next iteration in float32: the conversion there is what gives the running product operands of its
    # own. Carried as the operands themselves, the next ones would be written over them while they are read.
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    _, last_value_scale = load_scales(key_scale_ptr, value_scale_ptr, lane, lane < 0)
    tl.assume(first_begin < end)  # else the zeros of no iteration would be merged with sums that are being written
    for tile_begin in range(first_begin, end, BLOCK_N):
        positions = tile_begin + lane
        is_wanted = positions < end
        is_last_wanted = positions >= first_begin + BLOCK_N  # there is no tile before the first
        if HAS_WINDOW:  # blocks before the window may have been given to others
            is_wanted = is_wanted & (positions >= begin)
            is_last_wanted = is_last_wanted & (positions >= begin + BLOCK_N)
        key = _load_kv_tile(key_ptrs, block_ids, is_wanted, dims, BLOCK_STRIDE, HEAD_DIM, BLOCK_D, DTYPE)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if IS_SKEWED:
            value = _load_kv_tile(
                value_ptrs, last_block_ids, is_last_wanted, dims, BLOCK_STRIDE, HEAD_DIM, BLOCK_D, DTYPE
            )
        else:
            value = _load_kv_tile(value_ptrs, block_ids, is_wanted, dims, BLOCK_STRIDE, HEAD_DIM, BLOCK_D, DTYPE)
        scale_at = (block_ids.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + lane % BLOCK_SIZE
        key_scale, value_scale = load_scales(key_scale_ptr, value_scale_ptr, scale_at, is_wanted)
        value = scale_values(value, last_value_scale if IS_SKEWED else value_scale, value_scale_ptr)
        last_value_scale = value_scale
        last_block_ids = block_ids
        ahead = (tile_begin + BLOCK_N) // BLOCK_SIZE
        block_ids = tl.load(column_ptrs + ahead, mask=lane < end - tile_begin - BLOCK_N, other=0)
        if IS_SKEWED:
            acc = tl.dot(weights.to(DTYPE), value, acc * kept[:, None], input_precision="ieee")

        scores = scale_scores(scores, key_scale, key_scale_ptr)
        if HAS_SOFT_CAP:
            scores = _cap(scores, scale, soft_cap)
        if IS_SKEWED:
            scores = _hide_in_cut_tile(
                scores, positions, own, tile_begin, first_own, end, sliding_window, BLOCK_N, HAS_WINDOW
            )
        else:  # a branch would cost the older matrix instructions a trip of the weights through shared memory
            scores = _hide(scores, positions, own, sliding_window, HAS_WINDOW)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * to_log2)
        weights = tl.exp2(scores * to_log2 - new_peak[:, None])
        kept = tl.exp2(peak - new_peak)
        total = total * kept + tl.sum(weights, 1)
        peak = new_peak
        weights = scale_weights(weights, value_scale, value_scale_ptr, DTYPE)
        if not IS_SKEWED:
            acc = tl.dot(weights.to(DTYPE), value, acc * kept[:, None], input_precision="ieee")

    if IS_SKEWED:
        positions = (end - 1) // BLOCK_N * BLOCK_N + lane
        is_wanted = (positions >= begin) & (positions < end)
        value = _load_kv_tile(value_ptrs, last_block_ids, is_wanted, dims, BLOCK_STRIDE, HEAD_DIM, BLOCK_D, DTYPE)
        value = scale_values(value, last_value_scale, value_scale_ptr)
        acc = tl.dot(weights.to(DTYPE), value, acc * kept[:, None], input_precision="ieee")
    out_at = (row_start + token).to(tl.int64) * stride_ot + head * stride_oh
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row without a query may have seen no key
    tl.store(out_ptr + out_at[:, None] + dims[None, :], acc.to(DTYPE), mask=is_element)


def prefill_attention(
    out: Tensor,
    query: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    *,
    min_query_len: int = 1,
) -> None:
    """out [T, Hq, D] = attention of query [T, Hq, D] over the cache.

    Writes nothing for rows with fewer than `min_query_len` queries: another kernel has those. The scale is positive;
    out and cache are contiguous; a block has a power of two of tokens, and no more than a tile has keys.
    """
    shape = PrefillShape(
        num_heads=query.shape[1],
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        block_size=cache.block_size,
        element_bytes=query.element_size(),
        is_quantized=cache.is_quantized,
    )
    config = _config(shape, query.device)
    num_tiles = _num_tiles(metadata, config.tile_tokens, min_query_len)
    launch(
        _prefill_kernel,
        (num_tiles * (shape.num_heads // config.pack),),
        out,
        query,
        *codes_to_read(cache),
        cache.key_scale,
        cache.value_scale,
        metadata.block_tables,
        metadata.query_start_loc,
        metadata.seq_lens,
        scale,
        soft_cap or 1.0,
        sliding_window or 0,
        metadata.num_requests,
        out.stride(0),
        out.stride(1),
        *query.stride(),
        metadata.block_tables.stride(0),
        **_constexprs(shape, config, min_query_len, sliding_window is not None, soft_cap is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@functools.cache
def _config(shape: PrefillShape, device: torch.device) -> PrefillConfig:
    return prefill_config(shape, device_traits(device), tuned("prefill_attention", shape.tuning_key, device))


def _num_tiles(metadata: AttentionMetadata, tile_tokens: int, min_query_len: int) -> int:
    """How many tiles the step's chunks have; in a graph that is captured, a bound for whatever it is replayed on."""
    if metadata.seq_lens.is_cuda and torch.cuda.is_current_stream_capturing():
        return _most_tiles(metadata, tile_tokens)
    key = ("prefill_attention", tile_tokens, min_query_len)
    if key not in metadata.plans:
        query_lens = (stop - start for start, stop in pairwise(metadata.host_query_start_loc))
        metadata.plans[key] = sum(cdiv(length, tile_tokens) for length in query_lens if length >= min_query_len)
    return metadata.plans[key]


def _most_tiles(metadata: AttentionMetadata, tile_tokens: int) -> int:
    """How many tiles any chunks of the step's tokens can have: each chunk's last one may be almost empty."""
    return metadata.num_tokens // tile_tokens + metadata.num_requests


def _constexprs(
    shape: PrefillShape, config: PrefillConfig, min_query_len: int, has_window: bool, has_soft_cap: bool
) -> dict[str, object]:
    return {
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_SIZE": shape.block_size,
        "MIN_QUERY_LEN": min_query_len,
        "PACK": config.pack,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, next_power_of_2(shape.head_dim)),
        "BLOCK_B": _BLOCK_B,
        "QUERY_IN_REGISTERS": config.query_in_registers,
        "IS_SKEWED": config.is_skewed,
        "HAS_WINDOW": has_window,
        "HAS_SOFT_CAP": has_soft_cap,
    }


# What the configuration for chips without asynchronous matrix units is compiled for.
_A100 = DeviceTraits("NVIDIA A100", (8, 0), 108, 163 * KIB, 40 * KIB * KIB)


def aot_cases() -> Iterator[AotCase]:
    """The head dimensions and block sizes that we serve, each kind of layer, groups of heads, both configurations."""
    for head_dim in (64, 80, 96, 128, 256):
        for block_size in (16, 32):
            yield _aot_case(H200, head_dim, block_size=block_size)
        yield _aot_case(_A100, head_dim)
    for head_dim in (64, 128, 256):
        for has_window, has_soft_cap in ((True, False), (False, True), (True, True)):
            yield _aot_case(H200, head_dim, has_window=has_window, has_soft_cap=has_soft_cap)
    yield _aot_case(H200, 128, num_heads=28, num_kv_heads=4)
    yield _aot_case(H200, 128, num_heads=32, num_kv_heads=32)
    yield _aot_case(H200, 128, dtype="fp16")
    for codes in QUANTIZED_TYPES:
        device = _A100 if codes == "u8" else H200
        for head_dim in (64, 128, 256):
            yield _aot_case(device, head_dim, codes=codes)
        yield _aot_case(device, 128, has_window=True, has_soft_cap=True, codes=codes)
        yield _aot_case(device, 128, dtype="fp16", codes=codes)
    yield _aot_case(_A100, 128, codes="i8")


def _aot_case(
    device: DeviceTraits,
    head_dim: int,
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    block_size: int = 16,
    has_window: bool = False,
    has_soft_cap: bool = False,
    dtype: str = "bf16",
    codes: str | None = None,
) -> AotCase:
    shape = PrefillShape(num_heads, num_kv_heads, head_dim, block_size, 2, codes is not None)
    config = prefill_config(shape, device)
    signature = dict.fromkeys(("out_ptr", "query_ptr"), f"*{dtype}")
    pointers, constexprs = cache_signature(dtype, codes)
    signature |= dict.fromkeys(("table_ptr", "query_start_ptr", "seq_len_ptr"), "*i32")
    signature |= {"scale": "fp32", "soft_cap": "fp32", "sliding_window": "i32", "num_rows": "i32"}
    signature |= dict.fromkeys(("stride_ot", "stride_oh", "stride_qt", "stride_qh"), "i32:16")
    signature |= {"stride_qd": "i32:1", "stride_bt": "i32"}
    kinds = f"{'/window' if has_window else ''}{'/cap' if has_soft_cap else ''}{f'/{codes}' if codes else ''}"
    name = f"prefill_attention/{dtype}/{num_heads}:{num_kv_heads}x{head_dim}/b{block_size}{kinds}"
    return AotCase(
        name=name if config.is_skewed else f"{name}/in step",
        kernel=_prefill_kernel,
        signature=signature | pointers,
        constexprs=constexprs | _constexprs(shape, config, 9, has_window, has_soft_cap),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects_wgmma=config.is_skewed,
        archs=archs_of(codes),
    )
