# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: tokens sorted by adapter once a step, then a shrink and an expand kernel for each projection.

Every program takes a tile of tokens of one adapter, as in Punica's SGMV (arXiv 2310.18547, section 4), and finds out
which on the device: the grid depends on the number of tokens and slots alone, so a captured graph serves any mixture
of adapters. With few tokens the shrink divides the inner dimension among programs, which leave partial sums; the
expand adds them up as it reads them, always in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import TRITON_TYPES, fall_back, launch
from wavetrain_kernels.gpu.tuning import tuned
from wavetrain_kernels.lora_adapters import LoraAdapters, LoraBatch
from wavetrain_kernels.reference import lora as reference

# T = tokens in the step, S = slots, L = slices of a projection, R = room for ranks, H = in, N = out, P = parts.

# Up to so many tokens a step is bound by reading the adapters; above, by arithmetic.
_FEW_TOKENS = 256
# A part's share of the inner dimension; below it a program has too few loads in flight to be worth its start.
_PART_FEATURES = 512
_MAX_PARTS = 8
_SORT_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How one of the two products is launched: tile of tokens, tile of outputs, step of the inner dimension."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def num_lora_parts(num_tokens: int, in_features: int) -> int:
    """Returns how many partial sums `lora_shrink` leaves."""
    if num_tokens > _FEW_TOKENS:
        return 1
    return max(1, min(_MAX_PARTS, in_features // _PART_FEATURES))


def shrink_config(num_tokens: int, rank: int, device: torch.device | None = None) -> LoraConfig:
    """Returns how the shrink is launched for so many tokens, and room for so many ranks."""
    is_few, block_n = num_tokens <= _FEW_TOKENS, _block(rank, 64)
    found = tuned("lora_shrink", ("few" if is_few else "many", block_n), device)
    if found is not None:
        return LoraConfig(**found)
    if is_few:
        return LoraConfig(block_m=16, block_n=min(block_n, 32), block_k=256, num_warps=4, num_stages=3)
    return LoraConfig(block_m=64, block_n=block_n, block_k=64, num_warps=4, num_stages=4)


def expand_config(num_tokens: int, rank: int, device: torch.device | None = None) -> LoraConfig:
    """Returns how the expand is launched for so many tokens, and room for so many ranks."""
    is_few, block_k = num_tokens <= _FEW_TOKENS, _block(rank, 64)
    found = tuned("lora_expand", ("few" if is_few else "many", block_k), device)
    if found is not None:
        return LoraConfig(**found)
    if is_few:
        return LoraConfig(block_m=16, block_n=64, block_k=block_k, num_warps=4, num_stages=2)
    return LoraConfig(block_m=64, block_n=128, block_k=block_k, num_warps=8, num_stages=2)


def sort_by_adapter(sorted_tokens: Tensor, slot_starts: Tensor, token_slots: Tensor) -> None:
    """See KernelSet. One program a slot: each counts those below its own, then writes its own."""
    num_slots = slot_starts.shape[0] - 1
    launch(
        _sort_by_adapter_kernel,
        (num_slots,),
        sorted_tokens,
        slot_starts,
        token_slots,
        token_slots.shape[0],
        num_slots,
        BLOCK=_SORT_BLOCK,
        num_warps=4,
    )


def lora_shrink(parts: Tensor, x: Tensor, adapters: LoraAdapters, batch: LoraBatch) -> None:
    """See KernelSet."""
    num_slots, num_slices, rank, in_features = adapters.a.shape
    if x.dtype not in TRITON_TYPES:
        fall_back("lora_shrink", str(x.dtype))
        parts.zero_()  # the reference leaves but one sum
        reference.lora_shrink(parts, x, adapters, batch)
        return
    config = shrink_config(batch.num_tokens, rank, x.device)
    launch(
        _lora_shrink_kernel,
        (_num_tiles(batch, config.block_m), num_slices * -(-rank // config.block_n), parts.shape[0]),
        parts,
        x,
        adapters.a,
        adapters.scales,
        adapters.ranks,
        batch.sorted_tokens,
        batch.slot_starts,
        batch.num_tokens,
        x.stride(0),
        NUM_SLOTS=num_slots,
        NUM_SLICES=num_slices,
        RANK=rank,
        IN_FEATURES=in_features,
        NUM_PARTS=parts.shape[0],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def lora_expand(out: Tensor, parts: Tensor, adapters: LoraAdapters, batch: LoraBatch) -> None:
    """See KernelSet."""
    num_slots, num_slices, rank, _ = adapters.a.shape
    if out.dtype not in TRITON_TYPES:
        fall_back("lora_expand", str(out.dtype))
        reference.lora_expand(out, parts, adapters, batch)
        return
    config = expand_config(batch.num_tokens, rank, out.device)
    sizes = (*adapters.slice_sizes, 0, 0)
    launch(
        _lora_expand_kernel,
        (_num_tiles(batch, config.block_m), sum(-(-size // config.block_n) for size in adapters.slice_sizes)),
        out,
        parts,
        adapters.b,
        adapters.ranks,
        batch.sorted_tokens,
        batch.slot_starts,
        batch.num_tokens,
        out.stride(0),
        NUM_SLOTS=num_slots,
        NUM_SLICES=num_slices,
        RANK=rank,
        SIZE_0=sizes[0],
        SIZE_1=sizes[1],
        SIZE_2=sizes[2],
        NUM_PARTS=parts.shape[0],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _num_tiles(batch: LoraBatch, block_m: int) -> int:
    """At most so many tiles of tokens there are, however the tokens are spread over the slots."""
    return min(batch.num_tokens, -(-batch.num_tokens // block_m) + batch.num_slots)


def _block(size: int, most: int) -> int:
    """A power of two for a product's tile: 16 at least, as the matrix instructions have it."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


@triton.jit(do_not_specialize=["num_tokens", "num_slots"], do_not_specialize_on_alignment=["slots_ptr"])
def _sort_by_adapter_kernel(
    sorted_ptr,
    starts_ptr,
    slots_ptr,
    num_tokens,
    num_slots,
    BLOCK: tl.constexpr,
):
    """Writes where the program's slot starts, and its tokens from there on, in their order."""
    slot = tl.program_id(0)
    below = tl.zeros([BLOCK], dtype=tl.int32)
    own = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_tokens, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
        below += ((slots >= 0) & (slots < slot)).to(tl.int32)
        own += (slots == slot).to(tl.int32)
    position = tl.sum(below, axis=0)
    count = tl.sum(own, axis=0)
    tl.store(starts_ptr + slot, position)
    if slot == num_slots - 1:
        tl.store(starts_ptr + num_slots, position + count)
    if count > 0:
        for start in range(0, num_tokens, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
            is_own = slots == slot
            order = tl.cumsum(is_own.to(tl.int32), axis=0)
            tl.store(sorted_ptr + position + order - 1, tokens, mask=is_own)
            position += tl.sum(is_own.to(tl.int32), axis=0)


@triton.jit
def _find_tile(starts_ptr, tile, NUM_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns a tile's slot (NUM_SLOTS: there is none), where it starts and its slot ends among the sorted tokens."""
    SLOTS: tl.constexpr = triton.next_power_of_2(NUM_SLOTS)
    slots = tl.arange(0, SLOTS)
    starts = tl.load(starts_ptr + slots, mask=slots < NUM_SLOTS, other=0)
    ends = tl.load(starts_ptr + slots + 1, mask=slots < NUM_SLOTS, other=0)
    num_tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    slot = tl.sum((tl.cumsum(num_tiles, axis=0) <= tile).to(tl.int32), axis=0)
    tiles_before = tl.sum(tl.where(slots < slot, num_tiles, 0), axis=0)
    start = tl.sum(tl.where(slots == slot, starts, 0), axis=0) + (tile - tiles_before) * BLOCK_M
    end = tl.sum(tl.where(slots == slot, ends, 0), axis=0)
    return tl.minimum(slot, NUM_SLOTS), start, end


@triton.jit(do_not_specialize=["num_tokens"])
def _lora_shrink_kernel(
    parts_ptr,  # [P, T, L, R]
    x_ptr,  # [T, H]
    a_ptr,  # [S, L, R, H]
    scales_ptr,  # [S]
    ranks_ptr,  # [S]
    sorted_ptr,  # [T]
    starts_ptr,  # [S + 1]
    num_tokens,
    stride_xt,
    NUM_SLOTS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of tokens of one adapter, one tile of ranks of one slice, one part of the inner dimension."""
    RANK_TILES: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
    # Whole steps in every part but the last.
    PART: tl.constexpr = ((IN_FEATURES + NUM_PARTS * BLOCK_K - 1) // (NUM_PARTS * BLOCK_K)) * BLOCK_K
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    slot, start, end = _find_tile(starts_ptr, tl.program_id(0), NUM_SLOTS, BLOCK_M)  # pyright: ignore
    if slot == NUM_SLOTS:
        return
    rank = tl.load(ranks_ptr + slot)
    slice_index = tl.program_id(1) // RANK_TILES
    first_rank = (tl.program_id(1) % RANK_TILES) * BLOCK_N
    if first_rank >= rank:
        return
    part = tl.program_id(2)
    rows = start + tl.arange(0, BLOCK_M)
    tokens = tl.load(sorted_ptr + rows, mask=rows < end, other=0).to(tl.int64)
    ranks = first_rank + tl.arange(0, BLOCK_N)
    features = part * PART + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens[:, None] * stride_xt + features[None, :]
    a_rows = (slot.to(tl.int64) * NUM_SLICES + slice_index) * RANK + ranks
    a_ptrs = a_ptr + a_rows[None, :] * IN_FEATURES + features[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(0, PART, BLOCK_K):
        is_inside = features + step < IN_FEATURES
        x = tl.load(x_ptrs + step, mask=(rows < end)[:, None] & is_inside[None, :], other=0.0)
        a = tl.load(a_ptrs + step, mask=(ranks < rank)[None, :] & is_inside[:, None], other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
    total *= tl.load(scales_ptr + slot)
    out_rows = (part * num_tokens + tokens) * NUM_SLICES + slice_index
    out_ptrs = parts_ptr + out_rows[:, None] * RANK + ranks[None, :]
    tl.store(out_ptrs, total, mask=(rows < end)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _lora_expand_kernel(
    out_ptr,  # [T, N]
    parts_ptr,  # [P, T, L, R]
    b_ptr,  # [S, N, R]
    ranks_ptr,  # [S]
    sorted_ptr,  # [T]
    starts_ptr,  # [S + 1]
    num_tokens,
    stride_ot,
    NUM_SLOTS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    SIZE_0: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of tokens of one adapter, one tile of outputs of one slice."""
    TILES_0: tl.constexpr = (SIZE_0 + BLOCK_N - 1) // BLOCK_N
    TILES_1: tl.constexpr = TILES_0 + (SIZE_1 + BLOCK_N - 1) // BLOCK_N
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    slot, start, end = _find_tile(starts_ptr, tl.program_id(0), NUM_SLOTS, BLOCK_M)  # pyright: ignore
    if slot == NUM_SLOTS:
        return
    rank = tl.load(ranks_ptr + slot)
    if rank == 0:
        return
    tile = tl.program_id(1)
    slice_index = (tile >= TILES_0).to(tl.int32) + (tile >= TILES_1).to(tl.int32)
    first_tile = tl.where(slice_index == 0, 0, tl.where(slice_index == 1, TILES_0, TILES_1))
    offset = tl.where(slice_index == 0, 0, tl.where(slice_index == 1, SIZE_0, SIZE_0 + SIZE_1))
    size = tl.where(slice_index == 0, SIZE_0, tl.where(slice_index == 1, SIZE_1, SIZE_2))
    columns = (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < size
    columns += offset
    rows = start + tl.arange(0, BLOCK_M)
    tokens = tl.load(sorted_ptr + rows, mask=rows < end, other=0).to(tl.int64)
    b_rows = slot.to(tl.int64) * (SIZE_0 + SIZE_1 + SIZE_2) + columns
    part_rows = tokens * NUM_SLICES + slice_index
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_rank in range(0, rank, BLOCK_K):
        ranks = first_rank + tl.arange(0, BLOCK_K)
        part_ptrs = parts_ptr + part_rows[:, None] * RANK + ranks[None, :]
        is_sum = (rows < end)[:, None] & (ranks < rank)[None, :]
        shrunk = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for part in tl.static_range(NUM_PARTS):
            part_offset = part * num_tokens.to(tl.int64) * NUM_SLICES * RANK
            shrunk += tl.load(part_ptrs + part_offset, mask=is_sum, other=0.0)
        b_ptrs = b_ptr + b_rows[None, :] * RANK + ranks[:, None]
        b = tl.load(b_ptrs, mask=(ranks < rank)[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(shrunk.to(b.dtype), b, total, input_precision="ieee")
    out_ptrs = out_ptr + tokens[:, None] * stride_ot + columns[None, :]
    is_output = (rows < end)[:, None] & is_column[None, :]
    total += tl.load(out_ptrs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_output)


# Projections of an 8B Llama, and the types and ranks that each is compiled for: three slices, two and one.
_AOT_PROJECTIONS = {
    "qkv": (4096, (4096, 1024, 1024), (("bf16", 16), ("bf16", 64), ("bf16", 256), ("fp16", 16), ("fp32", 16))),
    "gate_up": (4096, (14336, 14336), (("bf16", 16),)),
    "down": (14336, (4096,), (("bf16", 16),)),
}


def aot_cases() -> Iterator[AotCase]:
    """Every kernel for both sizes of a step and the ranks that are common."""
    signature = {"sorted_ptr": "*i32", "starts_ptr": "*i32", "slots_ptr": "*i32", "num_tokens": "i32"}
    yield AotCase(
        name="lora_sort",
        kernel=_sort_by_adapter_kernel,
        signature={**signature, "num_slots": "i32"},
        constexprs={"BLOCK": _SORT_BLOCK},
        num_warps=4,
        num_stages=3,
        is_decode=True,
    )
    for name, (in_features, sizes, kinds) in _AOT_PROJECTIONS.items():
        for num_tokens in (1, _FEW_TOKENS + 1):
            for dtype, rank in kinds:
                yield from _product_cases(f"{name}/{dtype}/r{rank}", num_tokens, dtype, rank, in_features, sizes)


def _product_cases(
    name: str, num_tokens: int, dtype: str, rank: int, in_features: int, sizes: tuple[int, ...]
) -> Iterator[AotCase]:
    is_few = num_tokens <= _FEW_TOKENS
    kind = f"{name}/{'few' if is_few else 'many'}"
    shared = {
        "NUM_SLOTS": 8,
        "NUM_SLICES": len(sizes),
        "RANK": rank,
        "NUM_PARTS": num_lora_parts(num_tokens, in_features),
    }
    indices = {"ranks_ptr": "*i32", "sorted_ptr": "*i32", "starts_ptr": "*i32", "num_tokens": "i32"}
    element = f"*{dtype}"
    shrink, expand = shrink_config(num_tokens, rank), expand_config(num_tokens, rank)
    yield AotCase(
        name=f"lora_shrink/{kind}",
        kernel=_lora_shrink_kernel,
        signature={
            "parts_ptr": "*fp32",
            "x_ptr": element,
            "a_ptr": element,
            "scales_ptr": "*fp32",
            **indices,
            "stride_xt": "i32:16",
        },
        constexprs={**shared, "IN_FEATURES": in_features, **_blocks(shrink)},
        num_warps=shrink.num_warps,
        num_stages=shrink.num_stages,
        is_decode=is_few,
    )
    padded = (*sizes, 0, 0)
    yield AotCase(
        name=f"lora_expand/{kind}",
        kernel=_lora_expand_kernel,
        signature={"out_ptr": element, "parts_ptr": "*fp32", "b_ptr": element, **indices, "stride_ot": "i32:16"},
        constexprs={**shared, **{f"SIZE_{index}": padded[index] for index in range(3)}, **_blocks(expand)},
        num_warps=expand.num_warps,
        num_stages=expand.num_stages,
        is_decode=is_few,
    )


def _blocks(config: LoraConfig) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
