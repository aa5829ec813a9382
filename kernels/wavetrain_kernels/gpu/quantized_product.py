# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit rows with 8-bit weights: int8 summed in int32, e4m3 in float32; many rows, so bound by arithmetic.

Turned round as the other products are: out.T = weight @ x.T. Where scales change every 128 inputs the sums of each 128
are scaled and added in float32, as DeepSeek-V3's report (section 3.3.2) has it. Hopper's fp8 instructions keep some 14
bits of their own sums: without such scales too they are added up in float32 every 128 inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import A100, H200, DeviceTraits, cdiv, device_traits, launch
from wavetrain_kernels.gpu.quantized_packing import PackedQuantized
from wavetrain_kernels.gpu.tuning import tuned
from wavetrain_kernels.gpu.weight_only_product import store_tile
from wavetrain_kernels.quantized_inputs import QuantizedInputs

# T = rows, N = outputs, K = inputs with their padding, G = groups of 128 inputs.

_BLOCK_K = 128
_SWIZZLE = 8  # tiles of rows that share a stretch of the weight before the next one's turn


@dataclass(frozen=True, slots=True)
class QuantizedProductConfig:
    """A launch: tiles of `block_n` outputs by `block_t` rows."""

    block_n: int
    block_t: int
    num_warps: int
    num_stages: int


# From the largest, which reads least.
_TILES = (
    QuantizedProductConfig(128, 256, 8, 4),
    QuantizedProductConfig(128, 128, 8, 4),
    QuantizedProductConfig(128, 64, 4, 4),
    QuantizedProductConfig(64, 64, 4, 4),
)


def quantized_product_config(
    bucket: int, out_features: int, device: DeviceTraits, *, sums_twice: bool, measured: dict[str, Any] | None = None
) -> QuantizedProductConfig:
    """Returns the configuration for a bucket of rows: the largest tile of which every SM has one, else the smallest.

    Args:
        sums_twice: sums of 128 inputs are added up apart from the whole, so a tile has twice the registers.
    """
    most = 256 if device.capability[0] == 9 and not sums_twice else 128
    tiles = [config for config in _TILES if config.block_t <= most]
    config = tiles[-1]
    for candidate in tiles:
        if cdiv(bucket, candidate.block_t) * cdiv(out_features, candidate.block_n) >= device.num_sms:
            config = candidate
            break
    stage_bytes = _BLOCK_K * (config.block_n + config.block_t)
    num_stages = max(2, min(config.num_stages, (device.shared_bytes * 7 // 8) // stage_bytes))
    return replace(config, **{"num_stages": num_stages, **(measured or {})})


@triton.jit
def rounded_sums(  # noqa: ANN201
    weight_ptrs, value_ptrs, weight_scale_ptrs, value_scale_ptrs,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, HAS_GROUPS: tl.constexpr, IS_GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [N, T] of products of 8-bit rows with an 8-bit weight over all inputs, scaled.

    Args:
        weight_ptrs: [N, BLOCK_K] of each output's first inputs.
        value_ptrs: [BLOCK_K, T] of each row's.
        weight_scale_ptrs: [N] of the first group; the others are SIZE apart.
        value_scale_ptrs: [T] likewise, next to each other.
    """
    is_int: tl.constexpr = weight_ptrs.dtype.element_ty == tl.int8
    weight_scale, value_scale = tl.load(weight_scale_ptrs), tl.load(value_scale_ptrs)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if is_int else tl.float32)
    for block in range(WIDTH // BLOCK_K):
        weight = tl.load(weight_ptrs + block * BLOCK_K)
        values = tl.load(value_ptrs + block * BLOCK_K)
        if HAS_GROUPS or IS_GROUPED:
            if HAS_GROUPS:
                weight_scale = tl.load(weight_scale_ptrs + block * SIZE)
            if IS_GROUPED:
                value_scale = tl.load(value_scale_ptrs + block)
            part = tl.dot(weight, values, out_dtype=tl.int32 if is_int else tl.float32)
            acc += part.to(tl.float32) * (weight_scale[:, None] * value_scale[None, :])
        elif is_int:
            total = tl.dot(weight, values, total, out_dtype=tl.int32)
        else:
            total = tl.dot(weight, values, total, max_num_imprecise_acc=BLOCK_K)
    if not (HAS_GROUPS or IS_GROUPED):
        acc = total.to(tl.float32) * (weight_scale[:, None] * value_scale[None, :])
    return acc * UNIT


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_product_kernel(
    out_ptr,  # [T, N], or [T, N / 2] with IS_GATED; contiguous
    values_ptr,  # [T, K], contiguous
    value_scales_ptr,  # [T, 1], or [T, G] with IS_GROUPED
    weight_ptr,  # [N, K], contiguous
    weight_scales_ptr,  # [1, N], or [G, N] with HAS_GROUPS
    bias_ptr,  # [N] or None
    num_rows,
    SIZE: tl.constexpr,  # N
    WIDTH: tl.constexpr,  # K
    UNIT: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    tiles_n: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    # Tiles that run at the same time shall share rows of both operands, in the second-level cache.
    tiles_t = tl.cdiv(num_rows, BLOCK_T)
    stripe = tl.program_id(0) // (SWIZZLE * tiles_n)
    height = tl.minimum(tiles_t - stripe * SWIZZLE, SWIZZLE)
    within = tl.program_id(0) % (SWIZZLE * tiles_n)
    tile_t, tile_n = stripe * SWIZZLE + within % height, within // height
    outputs, tokens = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    # What is past the end is the last one once more, and not stored: loads without a mask can be asynchronous.
    known, rows = tl.minimum(outputs, SIZE - 1), tl.minimum(tokens, num_rows - 1)
    inputs = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + known[:, None].to(tl.int64) * WIDTH + inputs[None, :]
    value_ptrs = values_ptr + rows[None, :].to(tl.int64) * WIDTH + inputs[:, None]
    value_scale_ptrs = value_scales_ptr + rows.to(tl.int64) * (WIDTH // BLOCK_K if IS_GROUPED else 1)
    acc = rounded_sums(
        weight_ptrs, value_ptrs, weight_scales_ptr + known, value_scale_ptrs,
        WIDTH, SIZE, UNIT, HAS_GROUPS, IS_GROUPED, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_tile(out_ptr, acc, bias_ptr, tile_n, tokens, num_rows, SIZE, IS_GATED, IS_SILU, BLOCK_N, BLOCK_T)


def quantized_product(
    out: Tensor, x: QuantizedInputs, packed: PackedQuantized, bias: Tensor | None, activation: str | None
) -> None:
    """out [T, N] = x @ weight.T + bias, or [T, N / 2] its gated units; x rounded for this weight."""
    num_rows, shape = x.num_rows, packed.shape
    is_grouped, has_groups = x.scales.shape[1] > 1, shape.group_size > 0
    config = _config(x, packed, sums_twice=is_grouped or has_groups or packed.scheme.values == "fp8")
    launch(
        _quantized_product_kernel,
        (cdiv(num_rows, config.block_t) * cdiv(shape.out_features, config.block_n),),
        out,
        x.values,
        x.scales,
        packed.words.view(x.values.dtype),
        packed.scales,
        bias,
        num_rows,
        **_constexprs(shape.out_features, x.values.shape[1], packed.unit, activation, config),
        HAS_GROUPS=has_groups,
        IS_GROUPED=is_grouped,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _config(x: QuantizedInputs, packed: PackedQuantized, *, sums_twice: bool) -> QuantizedProductConfig:
    shape, device = packed.shape, x.values.device
    bucket = 1 << max(x.num_rows - 1, 0).bit_length()
    key = (bucket, shape.out_features, shape.in_features, int(sums_twice))
    return quantized_product_config(
        bucket,
        shape.out_features,
        device_traits(device),
        sums_twice=sums_twice,
        measured=tuned("quantized_product", key, device),
    )


def _constexprs(
    out_features: int, width: int, unit: float, activation: str | None, config: QuantizedProductConfig
) -> dict[str, Any]:
    return {
        "SIZE": out_features,
        "WIDTH": width,
        "UNIT": unit,
        "IS_GATED": activation is not None,
        "IS_SILU": activation == "silu",
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "BLOCK_K": _BLOCK_K,
        "SWIZZLE": _SWIZZLE,
    }


def aot_cases() -> Iterator[AotCase]:
    """Every tile with int8 and, where there are such instructions, fp8; whole rows, and groups of 128 inputs."""
    cases: dict[str, AotCase] = {}
    schemes = (("i8", False), ("i8", True), ("fp8e4nv", False), ("fp8e4nv", True))
    sizes = ((4096, None, 128), (4096, None, 256), (4096, None, 8192), (28672, "silu", 512), (855, "gelu_tanh", 8192))
    for device, (values, is_grouped), (size, activation, bucket) in itertools.product((A100, H200), schemes, sizes):
        is_fp8 = values != "i8"
        if is_fp8 and device is A100:
            continue
        config = quantized_product_config(bucket, size, device, sums_twice=is_grouped or is_fp8)
        constexprs = _constexprs(size, 4096, 1.0, activation, config)
        constexprs |= {"HAS_GROUPS": is_grouped, "IS_GROUPED": is_grouped, "bias_ptr": None}
        signature = {"out_ptr": "*bf16", "values_ptr": f"*{values}", "weight_ptr": f"*{values}", "num_rows": "i32"}
        signature |= {"value_scales_ptr": "*fp32", "weight_scales_ptr": "*fp32"}
        name = f"quantized_product/{values}/{size}{'/a100' if device is A100 else ''}"
        name += f"/n{config.block_n}t{config.block_t}s{config.num_stages}"
        name += f"{'/grouped' if is_grouped else ''}{f'/{activation}' if activation else ''}"
        cases[name] = AotCase(
            name,
            _quantized_product_kernel,
            signature,
            constexprs,
            config.num_warps,
            config.num_stages,
            expects_wgmma=True,
            archs=("sm_90", "sm_100") if device is H200 else ("sm_80",),
        )
    yield from cases.values()
