# SPDX-License-Identifier: Apache-2.0
"""The feed-forward blocks of a mixture of experts: two grouped products over sorted pairs, then a sum for each token.

A program multiplies a tile of rows of one expert, which the table of `moe_routing` names; tiles that are not there end
at once, so grids depend on the number of tokens alone. The first product gathers its rows from x and leaves
act(gate) * up, in the order of the pairs; the second leaves each pair's weighted term where the pair belongs, so that a
token's terms lie side by side and are added by rank. As in vLLM's fused MoE, but for the padded list of rows, which a
table replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.activation import activated
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import TRITON_TYPES, cdiv, fall_back, launch, next_power_of_2
from wavetrain_kernels.gpu.moe_config import BEFORE_HOPPER, ProductConfig, down_config, gate_up_config
from wavetrain_kernels.gpu.moe_routing import SortedPairs, find_tile, sort_pairs
from wavetrain_kernels.gpu.quantized_experts import QuantizedExperts
from wavetrain_kernels.gpu.quantized_moe import multiply_down, multiply_gate_up, rows_at_most
from wavetrain_kernels.reference import moe as reference

# T = tokens, E = experts, k = experts of a token, P = T * k pairs, H = hidden size, I = units of an expert.

_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tiles"])
def _gate_up_kernel(
    units_ptr,  # [P, I], contiguous, in the order of the sorted pairs
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2 * I, H], contiguous
    sorted_ptr,  # [P]
    tiles_ptr,  # [3, tiles]
    num_tiles,
    stride_xt,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    expert, first, end, column_tile = find_tile(tiles_ptr, num_tiles, UNITS, BLOCK_N, GROUP_M)  # pyright: ignore
    if expert < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    # Rows and columns past the end are others once more, and not stored: loads without a mask can be asynchronous.
    tokens = (tl.load(sorted_ptr + tl.minimum(rows, end - 1)) // TOP_K).to(tl.int64)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens[:, None] * stride_xt + features[None, :]
    weights = expert.to(tl.int64) * (2 * UNITS * HIDDEN) + (columns % UNITS)[None, :] * HIDDEN + features[:, None]
    gate_ptrs = gate_up_ptr + weights
    up_ptrs = gate_ptrs + UNITS * HIDDEN
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            x = tl.load(x_ptrs + start)
            gates = tl.load(gate_ptrs + start)
            ups = tl.load(up_ptrs + start)
        else:
            is_there = start + features < HIDDEN
            x = tl.load(x_ptrs + start, mask=is_there[None, :], other=0.0)
            gates = tl.load(gate_ptrs + start, mask=is_there[:, None], other=0.0)
            ups = tl.load(up_ptrs + start, mask=is_there[:, None], other=0.0)
        gate = tl.dot(x, gates, gate, input_precision="ieee")
        up = tl.dot(x, ups, up, input_precision="ieee")
    dtype = units_ptr.dtype.element_ty  # rounded where the reference rounds
    units = activated(gate.to(dtype), up.to(dtype), IS_SILU)
    unit_ptrs = units_ptr + rows.to(tl.int64)[:, None] * UNITS + columns[None, :]
    tl.store(unit_ptrs, units, mask=(rows < end)[:, None] & (columns < UNITS)[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def _down_kernel(
    terms_ptr,  # [P, H], contiguous
    units_ptr,  # [P, I], contiguous, in the order of the sorted pairs
    down_ptr,  # [E, H, I], contiguous
    weights_ptr,  # [P]
    sorted_ptr,  # [P]
    tiles_ptr,  # [3, tiles]
    num_tiles,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    expert, first, end, column_tile = find_tile(tiles_ptr, num_tiles, HIDDEN, BLOCK_N, GROUP_M)  # pyright: ignore
    if expert < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_K)
    pairs = tl.load(sorted_ptr + tl.minimum(rows, end - 1)).to(tl.int64)
    weights = tl.load(weights_ptr + pairs)
    a_ptrs = units_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * UNITS + units[None, :]
    b_rows = expert.to(tl.int64) * HIDDEN + columns % HIDDEN
    b_ptrs = down_ptr + b_rows[None, :] * UNITS + units[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, UNITS, BLOCK_K):
        if UNITS % BLOCK_K == 0:
            a = tl.load(a_ptrs + start)
            b = tl.load(b_ptrs + start)
        else:
            is_there = start + units < UNITS
            a = tl.load(a_ptrs + start, mask=is_there[None, :], other=0.0)
            b = tl.load(b_ptrs + start, mask=is_there[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    dtype = terms_ptr.dtype.element_ty
    terms = total.to(dtype).to(tl.float32) * weights[:, None]
    term_ptrs = terms_ptr + pairs[:, None] * HIDDEN + columns[None, :]
    tl.store(term_ptrs, terms.to(dtype), mask=(rows < end)[:, None] & (columns < HIDDEN)[None, :])


@triton.jit
def _sum_terms_kernel(
    out_ptr,  # [T, H], contiguous
    terms_ptr,  # [T, k, H], contiguous
    expert_ids_ptr,  # [T, k], contiguous
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for rank in tl.static_range(TOP_K):
        expert = tl.load(expert_ids_ptr + token * TOP_K + rank)
        # The term of an expert that does not exist was never written.
        is_there = (columns < HIDDEN) & (expert >= 0) & (expert < NUM_EXPERTS)
        term_ptrs = terms_ptr + (token * TOP_K + rank) * HIDDEN + columns
        total += tl.load(term_ptrs, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + columns, total.to(out_ptr.dtype.element_ty), mask=columns < HIDDEN)


def fused_moe(
    out: Tensor,
    x: Tensor,
    gate_up: Tensor | QuantizedExperts,
    down: Tensor | QuantizedExperts,
    weights: Tensor,
    expert_ids: Tensor,
    num_units: int,
    activation: str,
) -> None:
    """See KernelSet."""
    if x.dtype not in TRITON_TYPES:
        assert isinstance(gate_up, Tensor), "quantized experts are of Triton's types"
        assert isinstance(down, Tensor), "quantized experts are of Triton's types"
        fall_back("fused_moe", str(x.dtype))
        reference.fused_moe(out, x, gate_up, down, weights, expert_ids, num_units, activation)
        return
    if not x.shape[0]:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    weights, expert_ids = weights.contiguous(), expert_ids.contiguous()
    (num_tokens, top_k), hidden, num_experts = expert_ids.shape, x.shape[1], len(down)
    pairs = sort_pairs(expert_ids, num_experts, most_rows=rows_at_most(gate_up, down))
    # As large as activations of k times the tokens: from torch's allocator, which hands them on to other layers.
    units = x.new_empty(num_tokens * top_k, num_units)
    terms = x.new_empty(num_tokens * top_k, hidden)
    if isinstance(gate_up, Tensor):
        _multiply_gate_up(units, x, gate_up, pairs, top_k, activation)
    else:
        multiply_gate_up(units, x, gate_up, pairs, top_k, activation)
    if isinstance(down, Tensor):
        _multiply_down(terms, units, down, weights, pairs)
    else:
        multiply_down(terms, units, down, weights, pairs)
    block_h = min(_SUM_BLOCK, next_power_of_2(hidden))
    launch(
        _sum_terms_kernel,
        (num_tokens, cdiv(hidden, block_h)),
        out,
        terms,
        expert_ids,
        HIDDEN=hidden,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        BLOCK_H=block_h,
        num_warps=4,
    )


def _multiply_gate_up(
    units: Tensor, x: Tensor, gate_up: Tensor, pairs: SortedPairs, top_k: int, activation: str
) -> None:
    hidden, num_units = x.shape[1], units.shape[1]
    config = gate_up_config(pairs.block_m, hidden, num_units, x.device)
    launch(
        _gate_up_kernel,
        (pairs.num_tiles * cdiv(num_units, config.block_n),),
        units,
        x,
        gate_up,
        pairs.pairs,
        pairs.tiles,
        pairs.num_tiles,
        # The stride of a dimension of size 1 means nothing; whatever it is, it must not make another variant.
        x.stride(0) if x.shape[0] > 1 else hidden,
        TOP_K=top_k,
        IS_SILU=activation == "silu",
        **_product_options(config, pairs.block_m, hidden, num_units),
    )


def _multiply_down(terms: Tensor, units: Tensor, down: Tensor, weights: Tensor, pairs: SortedPairs) -> None:
    hidden, num_units = terms.shape[1], units.shape[1]
    config = down_config(pairs.block_m, hidden, num_units, units.device)
    launch(
        _down_kernel,
        (pairs.num_tiles * cdiv(hidden, config.block_n),),
        terms,
        units,
        down,
        weights,
        pairs.pairs,
        pairs.tiles,
        pairs.num_tiles,
        **_product_options(config, pairs.block_m, hidden, num_units),
    )


def _product_options(config: ProductConfig, block_m: int, hidden: int, num_units: int) -> dict[str, int]:
    return {
        **_product_constexprs(config, block_m, hidden, num_units),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _product_constexprs(config: ProductConfig, block_m: int, hidden: int, num_units: int) -> dict[str, int]:
    return {
        "HIDDEN": hidden,
        "UNITS": num_units,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


# Hidden size, units, experts of a token: of Mixtral 8x7B, Qwen3-30B-A3B, and sizes that no tile divides.
_AOT_SHAPES = {"mixtral": (4096, 14336, 2), "qwen3": (2048, 768, 8), "odd": (2056, 712, 8)}


def aot_cases() -> Iterator[AotCase]:
    """Both products for every number of rows of a tile, and the sums."""
    for name, (hidden, num_units, top_k) in _AOT_SHAPES.items():
        for dtype, block_m in (("bf16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp16", 16), ("fp16", 128)):
            configs = gate_up_config(block_m, hidden, num_units), down_config(block_m, hidden, num_units)
            kind = f"{name}/{dtype}/m{block_m}"
            yield from _product_cases(kind, f"*{dtype}", block_m, hidden, num_units, top_k, *configs)
            if block_m == 128:
                others = _product_cases(kind, f"*{dtype}", block_m, hidden, num_units, top_k, BEFORE_HOPPER, configs[1])
                yield replace(next(others), name=f"moe_gate_up/{kind}/before_hopper")
        yield AotCase(
            f"moe_sum/{name}",
            _sum_terms_kernel,
            {"out_ptr": "*bf16", "terms_ptr": "*bf16", "expert_ids_ptr": "*i32"},
            {"HIDDEN": hidden, "NUM_EXPERTS": 128, "TOP_K": top_k, "BLOCK_H": _SUM_BLOCK},
            num_warps=4,
            num_stages=3,
            is_decode=True,
        )


def _product_cases(
    name: str,
    pointer: str,
    block_m: int,
    hidden: int,
    num_units: int,
    top_k: int,
    gate_up: ProductConfig,
    down: ProductConfig,
) -> Iterator[AotCase]:
    indices = {"sorted_ptr": "*i32", "tiles_ptr": "*i32", "num_tiles": "i32"}
    kinds: dict[str, Any] = {"is_decode": block_m <= 32, "expects_wgmma": block_m >= 64}
    stride = "i32:16" if hidden % 16 == 0 else "i32"
    yield AotCase(
        f"moe_gate_up/{name}",
        _gate_up_kernel,
        {"units_ptr": pointer, "x_ptr": pointer, "gate_up_ptr": pointer, **indices, "stride_xt": stride},
        {**_product_constexprs(gate_up, block_m, hidden, num_units), "TOP_K": top_k, "IS_SILU": True},
        gate_up.num_warps,
        gate_up.num_stages,
        **kinds,
    )
    yield AotCase(
        f"moe_down/{name}",
        _down_kernel,
        {"terms_ptr": pointer, "units_ptr": pointer, "down_ptr": pointer, "weights_ptr": "*fp32", **indices},
        _product_constexprs(down, block_m, hidden, num_units),
        down.num_warps,
        down.num_stages,
        **kinds,
    )
