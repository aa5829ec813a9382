# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and the pairs (token, expert) in the order of their experts.

Sorting is counting: a program takes a chunk of pairs, adds up what all chunks have of each expert, and so knows where
its own go. Nothing is left to the order in which programs run, and nothing goes to the host: grids depend on the number
of tokens alone, and the products find their tiles in a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, launch, next_power_of_2
from wavetrain_kernels.gpu.moe_config import MOST_ROWS, most_tiles, route_rows, rows_per_tile, sort_chunk
from wavetrain_kernels.gpu.workspace import workspace

# T = tokens, E = experts, k = experts of a token, P = T * k pairs.

_CHUNKS_AT_ONCE = 16
_TILES_AT_ONCE = 16
_MANY_PAIRS = 16384
# A key below that of any number, minus infinity too.
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def find_tile(  # noqa: ANN201
    tiles_ptr, num_tiles, SIZE_N: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """Returns the program's expert (-1: none), the first row of its tile, the end of its expert's, its column tile.

    GROUP_M row tiles, likely of one expert, take a column tile one after the other: its weights stay in the cache.
    """
    COLUMN_TILES: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // (GROUP_M * COLUMN_TILES)
    rows = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + program % (GROUP_M * COLUMN_TILES) % rows
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    return expert, first, end, program % (GROUP_M * COLUMN_TILES) // rows


@triton.jit(do_not_specialize=["num_tokens"])
def _route_experts_kernel(
    weights_ptr,  # [T, k], contiguous
    expert_ids_ptr,  # likewise
    logits_ptr,  # [T, E]
    num_tokens,
    stride_lt,
    stride_le,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    experts = tl.arange(0, BLOCK_E)[None, :]
    ranks = tl.arange(0, BLOCK_K)[None, :]
    is_expert = experts < NUM_EXPERTS
    # Rows past the last are like any other, and not stored.
    is_there = (tokens < num_tokens) & is_expert
    logits = tl.load(logits_ptr + tokens * stride_lt + experts * stride_le, mask=is_there, other=0.0)
    largest = tl.max(tl.where(is_expert, logits, float("-inf")), axis=1, keep_dims=True)
    powers = tl.where(is_expert, tl.exp(logits - largest), 0.0)
    total = tl.sum(powers, axis=1, keep_dims=True)
    # False for NaN too: no distribution. Then all keys are equal, and the first experts are taken.
    is_distribution = total < float("inf")
    values = tl.where(is_distribution & (logits != 0.0), logits, 0.0)
    # Integers that are in order as the floats are: those of negative numbers are turned round.
    bits = values.to(tl.int32, bitcast=True)
    keys = tl.where(is_expert, bits ^ ((bits >> 31) & 0x7FFFFFFF), _TAKEN)
    chosen_ids = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for rank in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1, keep_dims=True)
        expert = tl.min(tl.where(keys == best, experts, BLOCK_E), axis=1, keep_dims=True)
        power = tl.sum(tl.where(experts == expert, powers, 0.0), axis=1, keep_dims=True)
        keys = tl.where(experts == expert, _TAKEN, keys)
        chosen_ids = tl.where(ranks == rank, expert, chosen_ids)
        chosen = tl.where(ranks == rank, power, chosen)
    weights = chosen / tl.sum(chosen, axis=1, keep_dims=True) if RENORMALIZE else chosen / total
    weights = tl.where(is_distribution, weights, float("nan"))
    is_stored = (tokens < num_tokens) & (ranks < TOP_K)
    tl.store(weights_ptr + tokens * TOP_K + ranks, weights, mask=is_stored)
    tl.store(expert_ids_ptr + tokens * TOP_K + ranks, chosen_ids, mask=is_stored)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs_kernel(
    counts_ptr,  # [chunks, BLOCK_E]
    expert_ids_ptr,  # [P]
    num_pairs,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """How many of a chunk's pairs each expert has."""
    chunk = tl.program_id(0)
    pairs = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    experts = tl.arange(0, BLOCK_E)
    expert_ids = tl.load(expert_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    counts = tl.sum((expert_ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * BLOCK_E + experts, counts)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks", "num_tiles"])
def _place_pairs_kernel(
    sorted_ptr,  # [P]
    tiles_ptr,  # [3, tiles]
    counts_ptr,  # [chunks, BLOCK_E]; None with IS_SINGLE
    expert_ids_ptr,  # [P]
    num_pairs,
    num_chunks,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    IS_SINGLE: tl.constexpr,  # there is one chunk
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Puts a chunk's pairs in their places, and fills in a share of the table: expert (-1: none), first and end row."""
    chunk = tl.program_id(0)
    pairs = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    experts = tl.arange(0, BLOCK_E)
    expert_ids = tl.load(expert_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    # An id that no expert has is not below NUM_EXPERTS, or matches none of `experts`: such pairs are left out.
    is_of = (expert_ids[:, None] == experts[None, :]) & (experts < NUM_EXPERTS)[None, :]
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    if IS_SINGLE:
        total += tl.sum(is_of.to(tl.int32), axis=0)
    else:
        for start in range(0, num_chunks, BLOCK_C):
            chunks = start + tl.arange(0, BLOCK_C)
            count_ptrs = counts_ptr + chunks[:, None] * BLOCK_E + experts[None, :]
            is_count = (chunks < num_chunks)[:, None] & (experts < NUM_EXPERTS)[None, :]
            counts = tl.load(count_ptrs, mask=is_count, other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), axis=0)
    starts = tl.cumsum(total, axis=0) - total
    order = tl.cumsum(is_of.to(tl.int32), axis=0) - 1
    places = tl.sum(tl.where(is_of, order + (starts + before)[None, :], 0), axis=1)
    tl.store(sorted_ptr + places, pairs, mask=tl.sum(is_of.to(tl.int32), axis=1) > 0)

    tiles_of = (total + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles_of, axis=0)
    # First row of an expert's tile, less BLOCK_M times the tile's number.
    offsets = starts - (ends - tiles_of) * BLOCK_M
    for start in range(chunk * BLOCK_T, num_tiles, num_chunks * BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        expert = tl.sum((ends[None, :] <= tiles[:, None]).to(tl.int32), axis=1)
        is_own = experts[None, :] == expert[:, None]
        first = tl.sum(tl.where(is_own, offsets[None, :], 0), axis=1) + tiles * BLOCK_M
        end = tl.sum(tl.where(is_own, (starts + total)[None, :], 0), axis=1)
        is_tile = tiles < num_tiles
        tl.store(tiles_ptr + tiles, tl.where(expert < BLOCK_E, expert, -1), mask=is_tile)
        tl.store(tiles_ptr + num_tiles + tiles, first, mask=is_tile)
        tl.store(tiles_ptr + 2 * num_tiles + tiles, end, mask=is_tile)


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The pairs of a step by expert, in scratch memory that the next call takes.

    Attributes:
        pairs: [P] int32; pair p is rank p % k of token p // k. Those of experts that do not exist are left out.
        tiles: [3, tiles] int32: a tile's expert (-1: no such tile), its first row of `pairs`, its expert's end.
        block_m: rows of a tile.
    """

    pairs: Tensor
    tiles: Tensor
    block_m: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the table, of which some may not be there."""
        return self.tiles.shape[1]


def route_experts(weights: Tensor, expert_ids: Tensor, logits: Tensor, renormalize: bool) -> None:
    """See KernelSet."""
    (num_tokens, num_experts), top_k = logits.shape, weights.shape[1]
    block_t = route_rows(num_experts)
    launch(
        _route_experts_kernel,
        (cdiv(num_tokens, block_t),),
        weights,
        expert_ids,
        logits,
        num_tokens,
        logits.stride(0) if num_tokens > 1 else num_experts,
        logits.stride(1),
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        BLOCK_T=block_t,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_K=next_power_of_2(top_k),
        num_warps=4,
    )


def sort_pairs(expert_ids: Tensor, num_experts: int, *, most_rows: int = MOST_ROWS) -> SortedPairs:
    """Returns the pairs of expert_ids [T, k], contiguous, in the order of their experts, tiles of up to `most_rows`."""
    num_pairs, device = expert_ids.numel(), expert_ids.device
    block_m = min(most_rows, rows_per_tile(num_pairs, num_experts, device))
    block_p, block_e = sort_chunk(num_pairs, num_experts), next_power_of_2(num_experts)
    num_chunks, num_tiles = cdiv(num_pairs, block_p), most_tiles(num_pairs, num_experts, block_m)
    pairs = workspace("moe_pairs", (num_pairs,), torch.int32, device)
    tiles = workspace("moe_tiles", (3, num_tiles), torch.int32, device)
    counts = None
    if num_chunks > 1:
        counts = workspace("moe_counts", (num_chunks, block_e), torch.int32, device)
        launch(
            _count_pairs_kernel,
            (num_chunks,),
            counts,
            expert_ids,
            num_pairs,
            BLOCK_P=block_p,
            BLOCK_E=block_e,
            num_warps=8,
        )
    launch(
        _place_pairs_kernel,
        (num_chunks,),
        pairs,
        tiles,
        counts,
        expert_ids,
        num_pairs,
        num_chunks,
        num_tiles,
        NUM_EXPERTS=num_experts,
        IS_SINGLE=counts is None,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        BLOCK_E=block_e,
        BLOCK_C=_CHUNKS_AT_ONCE,
        BLOCK_T=_TILES_AT_ONCE,
        num_warps=8,
    )
    return SortedPairs(pairs, tiles, block_m)


def aot_cases() -> Iterator[AotCase]:
    """Mixtral's experts, Qwen3's, and a number that is no power of two."""
    for num_experts, top_k in ((8, 2), (60, 4), (128, 8)):
        block_e, name = next_power_of_2(num_experts), f"e{num_experts}/k{top_k}"
        yield AotCase(
            f"moe_route/{name}",
            _route_experts_kernel,
            {
                "weights_ptr": "*fp32",
                "expert_ids_ptr": "*i32",
                "logits_ptr": "*fp32",
                "num_tokens": "i32",
                "stride_lt": "i32:16" if num_experts % 16 == 0 else "i32",
                "stride_le": "i32:1",
            },
            {
                "NUM_EXPERTS": num_experts,
                "TOP_K": top_k,
                "RENORMALIZE": True,
                "BLOCK_T": route_rows(num_experts),
                "BLOCK_E": block_e,
                "BLOCK_K": next_power_of_2(top_k),
            },
            num_warps=4,
            num_stages=3,
            is_decode=True,
        )
        yield from _sort_cases(num_experts, block_e)


def _sort_cases(num_experts: int, block_e: int) -> Iterator[AotCase]:
    signature = {"counts_ptr": "*i32", "expert_ids_ptr": "*i32", "num_pairs": "i32"}
    blocks = {"BLOCK_P": sort_chunk(_MANY_PAIRS, num_experts), "BLOCK_E": block_e}
    yield AotCase(f"moe_count/e{num_experts}", _count_pairs_kernel, signature, blocks, 8, 3, is_decode=True)
    place = {"sorted_ptr": "*i32", "tiles_ptr": "*i32", **signature, "num_chunks": "i32", "num_tiles": "i32"}
    for is_single, num_pairs in ((True, 1), (True, blocks["BLOCK_P"]), (False, _MANY_PAIRS)):
        for block_m in (16, 128):
            constexprs = {
                "BLOCK_P": sort_chunk(num_pairs, num_experts),
                "BLOCK_E": block_e,
                "NUM_EXPERTS": num_experts,
                "IS_SINGLE": is_single,
                "BLOCK_M": block_m,
                "BLOCK_C": _CHUNKS_AT_ONCE,
                "BLOCK_T": _TILES_AT_ONCE,
            }
            types = dict(place)
            if is_single:
                del types["counts_ptr"]
                constexprs["counts_ptr"] = None
            kind = f"p{constexprs['BLOCK_P']}/{'single' if is_single else 'chunks'}"
            name = f"moe_place/e{num_experts}/m{block_m}/{kind}"
            yield AotCase(name, _place_pairs_kernel, types, constexprs, 8, 3, is_decode=True)
