# SPDX-License-Identifier: Apache-2.0
"""Grouped products of sorted pairs, in 8 bits, with experts of 8 bits: for so many rows an expert that they count.

What `quantized_product` is to a single weight; tiles, and where results go, are those of `quantized_moe`.
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
from wavetrain_kernels.gpu.moe_config import RoundedConfig, rounded_config
from wavetrain_kernels.gpu.moe_routing import SortedPairs, find_tile
from wavetrain_kernels.gpu.quantized_experts import QuantizedExperts
from wavetrain_kernels.gpu.quantized_product import rounded_sums
from wavetrain_kernels.gpu.sorted_pairs import store_pairs
from wavetrain_kernels.gpu.tuning import tuned
from wavetrain_kernels.quantized_inputs import QuantizedInputs

# P = pairs of a token and one of its experts, E = experts, N = outputs, K = inputs with their padding.

_BLOCK_K = 128


@triton.jit(do_not_specialize=["num_tiles", "num_pairs"])
def _rounded_experts_kernel(
    out_ptr,  # units [P, N / 2] in the order of the sorted pairs, or terms [P, N] in that of the pairs; contiguous
    values_ptr,  # [T, K] with TOP_K, else [P, K] in the order of the sorted pairs; contiguous
    value_scales_ptr,  # [T or P, 1], or [T or P, G] with IS_GROUPED
    words_ptr,  # [E, N, K], contiguous
    scales_ptr,  # [E, 1, N], or [E, G, N] with HAS_GROUPS
    weights_ptr,  # [P]; None with TOP_K
    sorted_ptr,  # [P]
    tiles_ptr,  # [3, tiles]
    num_tiles,
    num_pairs,
    SIZE: tl.constexpr,  # N
    WIDTH: tl.constexpr,  # K
    UNIT: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    TOP_K: tl.constexpr,  # 0: of the second projection
    IS_SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = WIDTH // BLOCK_K
    # pyright takes the call of a kernel's part for one of the kernel, which has no result.
    expert, first, end, tile_n = find_tile(tiles_ptr, num_tiles, SIZE, BLOCK_N, GROUP_M)  # pyright: ignore
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    # What is past the end is the last one once more, and not stored: loads without a mask can be asynchronous.
    known = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), SIZE - 1)
    places = first + tl.arange(0, BLOCK_T)
    last_place = tl.minimum(places, end - 1)
    pairs = tl.load(sorted_ptr + last_place)
    rows = (pairs // TOP_K if TOP_K else last_place).to(tl.int64)
    inputs = tl.arange(0, BLOCK_K)
    acc = rounded_sums(
        words_ptr + (expert * SIZE + known.to(tl.int64))[:, None] * WIDTH + inputs[None, :],
        values_ptr + rows[None, :] * WIDTH + inputs[:, None],
        scales_ptr + expert * ((NUM_GROUPS if HAS_GROUPS else 1) * SIZE) + known,
        value_scales_ptr + rows * (NUM_GROUPS if IS_GROUPED else 1),
        WIDTH, SIZE, UNIT, HAS_GROUPS, IS_GROUPED, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_pairs(
        out_ptr, acc, weights_ptr, pairs, places, end, num_pairs, tile_n, SIZE, TOP_K, IS_SILU, BLOCK_N, BLOCK_T
    )  # fmt: skip


def multiply_rounded(
    out: Tensor,
    x: QuantizedInputs,
    experts: QuantizedExperts,
    weights: Tensor | None,
    pairs: SortedPairs,
    top_k: int,
    *,
    is_silu: bool,
) -> None:
    """As `quantized_moe` multiplies, of rows that are rounded."""
    shape, device = experts.shape, device_traits(x.device)
    key = (pairs.block_m, shape.out_features, shape.in_features)
    config = rounded_config(pairs.block_m, device, tuned("moe_rounded", key, x.device))
    launch(
        _rounded_experts_kernel,
        (pairs.num_tiles * cdiv(shape.out_features, config.block_n),),
        out,
        x.values,
        x.scales,
        experts.words.view(x.values.dtype),
        experts.scales,
        weights,
        pairs.pairs,
        pairs.tiles,
        pairs.num_tiles,
        pairs.pairs.shape[0],
        **_constexprs(shape.out_features, x.values.shape[1], experts.unit, pairs.block_m, config),
        HAS_GROUPS=shape.group_size > 0,
        IS_GROUPED=x.scales.shape[1] > 1,
        TOP_K=top_k,
        IS_SILU=is_silu,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _constexprs(size: int, width: int, unit: float, block_m: int, config: RoundedConfig) -> dict[str, Any]:
    return {
        "SIZE": size,
        "WIDTH": width,
        "UNIT": unit,
        "BLOCK_T": block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": _BLOCK_K,
        "GROUP_M": config.group_m,
    }


def aot_cases() -> Iterator[AotCase]:
    """The first projection of Qwen3-30B-A3B in int8 by row and in fp8 by block, and the second in one of them."""
    sizes = ((1536, 2048, 8), (2048, 768, 0))
    for (size, width, top_k), (values, is_grouped) in itertools.product(sizes, (("i8", False), ("fp8e4nv", True))):
        if top_k or is_grouped:
            yield _aot_case(size, width, top_k, values, is_grouped, H200)
    yield _aot_case(*sizes[0], "i8", False, A100)


def _aot_case(size: int, width: int, top_k: int, values: str, is_grouped: bool, device: DeviceTraits) -> AotCase:
    block_m = 64 if device is A100 else 128
    config = rounded_config(block_m, device)
    constexprs = _constexprs(size, width, 1.0, block_m, config)
    constexprs |= {"HAS_GROUPS": is_grouped, "IS_GROUPED": is_grouped, "TOP_K": top_k, "IS_SILU": top_k > 0}
    signature = {"out_ptr": "*bf16", "values_ptr": f"*{values}", "value_scales_ptr": "*fp32"}
    signature |= {"words_ptr": f"*{values}", "scales_ptr": "*fp32", "sorted_ptr": "*i32", "tiles_ptr": "*i32"}
    signature |= {"num_tiles": "i32", "num_pairs": "i32"}
    if top_k:
        constexprs["weights_ptr"] = None
    else:
        signature["weights_ptr"] = "*fp32"
    return AotCase(
        f"moe_rounded/{values}/{size}x{width}{'/a100' if device is A100 else ''}",
        _rounded_experts_kernel,
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
        expects_wgmma=True,
        archs=("sm_80",) if device is A100 else ("sm_90",),  # Blackwell has 64 rows, as an A100: see `row_tile`
    )
