# SPDX-License-Identifier: Apache-2.0
"""Grouped products of sorted pairs with quantized experts, widened in registers as single weights of few rows are.

One kernel for both projections, turned round like `weight_only_product`, from which it has the loop over inputs; tiles
are those of `moe_routing`. The gated one gathers its rows from x and leaves gated units in the order of the pairs; the
other leaves each pair's weighted term where the pair belongs. Inputs of few rows stay in 16 bits, whatever the scheme
says of them, as reading the weight is most of the time; of many, those of schemes with 8-bit inputs are rounded, for
`rounded_experts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import A100, H200, DeviceTraits, cdiv, device_traits, launch
from wavetrain_kernels.gpu.moe_config import MOST_ROWS
from wavetrain_kernels.gpu.moe_routing import SortedPairs, find_tile
from wavetrain_kernels.gpu.quantized_experts import QuantizedExperts
from wavetrain_kernels.gpu.quantized_packing import QuantizedShape
from wavetrain_kernels.gpu.quantized_rows import expert_inputs
from wavetrain_kernels.gpu.rounded_experts import multiply_rounded
from wavetrain_kernels.gpu.sorted_pairs import store_pairs
from wavetrain_kernels.gpu.tuning import tuned
from wavetrain_kernels.gpu.weight_only_config import WeightOnlyConfig, chosen_config, row_tile
from wavetrain_kernels.gpu.weight_only_product import widened_sums
from wavetrain_kernels.quantized_weight import QuantizationScheme

# P = pairs of a token and one of its experts, E = experts, N = outputs, K = inputs, G = groups of inputs.

# From so many rows of a tile on, 8-bit products are worth the rounding.
_ROUNDED_FROM = 64
_SWIZZLE = 8  # tiles of many rows, likely of one expert, that share a stretch of its weight before the next one's turn


@triton.jit(do_not_specialize=["num_tiles", "num_pairs"])
def _quantized_experts_kernel(
    out_ptr,  # units [P, N / 2] in the order of the sorted pairs, or terms [P, N] in that of the pairs; contiguous
    x_ptr,  # [T, K] with TOP_K, else [P, K] in the order of the sorted pairs
    words_ptr,  # [E, N, NUM_BLOCKS * PLANE / 2], contiguous
    scales_ptr,  # [E, G, N], contiguous
    zeros_ptr,  # [E, G, N], contiguous, or None
    codebook_ptr,  # [16] or None
    order_ptr,  # [E, K], contiguous, or None
    weights_ptr,  # [P]; None with TOP_K
    sorted_ptr,  # [P]
    tiles_ptr,  # [3, tiles]
    num_tiles,
    num_pairs,
    stride_xt,
    SIZE: tl.constexpr,  # N
    IN_FEATURES: tl.constexpr,  # K
    NUM_BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale; 0: all
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    TOGETHER: tl.constexpr,
    VALUES: tl.constexpr,
    MIDDLE: tl.constexpr,
    TOP_K: tl.constexpr,  # 0: of the second projection
    IS_SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    expert, first, end, tile_n = find_tile(tiles_ptr, num_tiles, SIZE, BLOCK_N, GROUP_M)  # pyright: ignore
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # What is past the end is the last one once more, and not stored: loads without a mask can be asynchronous.
    known = tl.minimum(outputs, SIZE - 1)
    places = first + tl.arange(0, BLOCK_T)
    last_place = tl.minimum(places, end - 1)
    pairs = tl.load(sorted_ptr + last_place)
    rows = pairs // TOP_K if TOP_K else last_place
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * stride_xt
    if order_ptr is None:
        x_ptrs += tl.arange(0, PLANE)[:, None]
        orders = order_ptr
    else:
        orders = order_ptr + expert * IN_FEATURES
    words = words_ptr + (expert * SIZE + known.to(tl.int64))[:, None] * (NUM_BLOCKS * (PLANE // 2))
    grid = expert * (NUM_GROUPS * SIZE)
    acc = widened_sums(
        x_ptrs, places < end, words + tl.arange(0, PLANE // 2)[None, :], scales_ptr + grid,
        None if zeros_ptr is None else zeros_ptr + grid, codebook_ptr, orders, known, 0, NUM_BLOCKS, dtype,
        SIZE, IN_FEATURES, GROUP, PLANE, PLANES, TOGETHER, VALUES, MIDDLE, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    store_pairs(
        out_ptr, acc, weights_ptr, pairs, places, end, num_pairs, tile_n, SIZE, TOP_K, IS_SILU, BLOCK_N, BLOCK_T
    )  # fmt: skip


def rows_at_most(*stacks: Tensor | QuantizedExperts) -> int:
    """Returns the most rows that a tile may have for all of these."""
    found = [
        row_tile(MOST_ROWS, has_codebook=stack.shape.has_codebook, device=device_traits(stack.words.device))
        for stack in stacks
        if isinstance(stack, QuantizedExperts)
    ]
    return min(found, default=MOST_ROWS)


def multiply_gate_up(
    units: Tensor, x: Tensor, experts: QuantizedExperts, pairs: SortedPairs, top_k: int, activation: str
) -> None:
    """units [P, I], in the order of the sorted pairs = act(gate) * up of their tokens' rows of x [T, H]."""
    # The stride of a dimension of size 1 means nothing; whatever it is, it must not make another variant.
    stride = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    _multiply(units, x, stride, experts, None, pairs, top_k, is_silu=activation == "silu")


def multiply_down(terms: Tensor, units: Tensor, experts: QuantizedExperts, weights: Tensor, pairs: SortedPairs) -> None:
    """terms [P, H], in the order of the pairs = weights [T, k] times the products of units [P, I]."""
    _multiply(terms, units, units.shape[1], experts, weights, pairs, 0, is_silu=False)


def _multiply(
    out: Tensor,
    x: Tensor,
    stride: int,
    experts: QuantizedExperts,
    weights: Tensor | None,
    pairs: SortedPairs,
    top_k: int,
    *,
    is_silu: bool,
) -> None:
    rounded = expert_inputs(experts, x) if pairs.block_m >= _ROUNDED_FROM else None
    if rounded is not None:
        multiply_rounded(out, rounded, experts, weights, pairs, top_k, is_silu=is_silu)
        return
    config = _config(pairs.block_m, experts.shape, x)
    launch(
        _quantized_experts_kernel,
        (pairs.num_tiles * cdiv(experts.shape.out_features, config.block_n),),
        out,
        x,
        experts.words,
        experts.scales,
        experts.zeros,
        experts.codebook,
        experts.column_order,
        weights,
        pairs.pairs,
        pairs.tiles,
        pairs.num_tiles,
        pairs.pairs.shape[0],
        stride,
        **_constexprs(experts.shape, config),
        TOP_K=top_k,
        IS_SILU=is_silu,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _config(block_m: int, shape: QuantizedShape, x: Tensor) -> WeightOnlyConfig:
    key = (block_m, shape.out_features, shape.in_features, shape.bits)
    return chosen_config(block_m, shape, device_traits(x.device), tuned("moe_quantized", key, x.device))


def _constexprs(shape: QuantizedShape, config: WeightOnlyConfig) -> dict[str, Any]:
    return {
        "SIZE": shape.out_features,
        "IN_FEATURES": shape.in_features,
        "NUM_BLOCKS": shape.num_blocks,
        "NUM_GROUPS": cdiv(shape.in_features, shape.group_size) if shape.group_size else 1,
        "GROUP": shape.group_size,
        "PLANE": shape.plane,
        "PLANES": shape.planes,
        "TOGETHER": shape.together,
        "VALUES": shape.values,
        "MIDDLE": shape.middle,
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "GROUP_M": _SWIZZLE if config.block_t > 64 else 1,
    }


# Schemes by the names of the field, `z` for zeros.
_AOT_SCHEMES = {
    "w4g128": QuantizationScheme(values="int4", group_size=128),
    "w4g128z": QuantizationScheme(values="int4", group_size=128),
    "w8": QuantizationScheme(values="int8", group_size=1 << 20),
    "fp8g128": QuantizationScheme(values="fp8", group_size=128),
}


def aot_cases() -> Iterator[AotCase]:
    """Both projections of Qwen3-30B-A3B, few rows and many, as an A100 and an H200 are given them."""
    for name, scheme in _AOT_SCHEMES.items():
        yield _aot_case(name, scheme, (1536, 2048), 16, 8, H200)
        if name.startswith("w4"):
            yield _aot_case(name, scheme, (2048, 768), 16, 0, H200)
    for (size, top_k), name in itertools.product((((1536, 2048), 8), ((2048, 768), 0)), ("w4g128", "fp8g128")):
        yield _aot_case(name, _AOT_SCHEMES[name], size, MOST_ROWS, top_k, H200)
    yield _aot_case("w4g128", _AOT_SCHEMES["w4g128"], (1536, 2048), 16, 8, A100)
    yield _aot_case("w4g128", _AOT_SCHEMES["w4g128"], (2048, 768), 64, 0, A100)


def _aot_case(
    scheme_name: str, scheme: QuantizationScheme, size: tuple[int, int], block_m: int, top_k: int, device: DeviceTraits
) -> AotCase:
    shape = QuantizedShape.of(scheme, *size)
    config = chosen_config(block_m, shape, device)
    constexprs = {**_constexprs(shape, config), "TOP_K": top_k, "IS_SILU": top_k > 0}
    constexprs |= {"codebook_ptr": None, "order_ptr": None}
    signature = {"out_ptr": "*bf16", "x_ptr": "*bf16", "words_ptr": "*i32", "scales_ptr": "*fp32"}
    signature |= {"sorted_ptr": "*i32", "tiles_ptr": "*i32", "num_tiles": "i32", "num_pairs": "i32"}
    signature["stride_xt"] = "i32:16"
    for name, is_there in (("zeros_ptr", scheme_name.endswith("z")), ("weights_ptr", not top_k)):
        if is_there:
            signature[name] = "*fp32"
        else:
            constexprs[name] = None
    name = f"moe_quantized/{scheme_name}/{size[0]}x{size[1]}/m{block_m}{'/a100' if device is A100 else ''}"
    return AotCase(
        name,
        _quantized_experts_kernel,
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
        is_decode=block_m <= 64,
        expects_wgmma=True,
        expects_register_operand=True,
        # Only Hopper's registers hold the sums of so many rows: see `row_tile`.
        archs=("sm_80",) if device is A100 else ("sm_90",) if block_m == MOST_ROWS else ("sm_90", "sm_100"),
    )
