# SPDX-License-Identifier: Apache-2.0
"""The first half of a gated MLP for a few rows, as one launch: act(x @ gate.T) * (x @ up.T).

With few rows the product is bound by reading its weight, which any kernel with enough bytes in flight can do; so the
launch of the activation, and its way through memory, are saved. Each program multiplies rows of the weight by all of x
turned round: the weight's rows fill the tall side of a matrix instruction, which has 64 rows on Hopper, and the step's
rows the narrow one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.activation import activated
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import A100, H200, DeviceTraits, cdiv, device_traits, launch
from wavetrain_kernels.gpu.tuning import tuned

# T = rows, up to MAX_ROWS; K = inputs, I = outputs of each half.

MAX_ROWS = 16  # the narrowest tile of a matrix product: more rows than that pay for cuBLAS's tiles
_ROOM = 16 * 1024  # of shared memory, for what the compiler adds to the pipeline's tiles


@dataclass(frozen=True, slots=True)
class GatedProductConfig:
    """How a launch is cut into programs, each of `block_n` outputs; `is_fused` False: cuBLAS does it."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    is_fused: bool = True


def gated_product_config(size: int, device: DeviceTraits, measured: dict[str, Any] | None = None) -> GatedProductConfig:
    """Returns the configuration of a weight: not of a step's rows, so that it has one variant."""
    # 64 outputs of 64 inputs, 128 bytes of each row, are a tile that Hopper multiplies from shared memory. Narrow MLPs
    # are cut finer, so that each SM has a program; finer yet, and reading x again would count.
    block_n, block_k = (64, 64) if size >= 64 * device.num_sms else (32, 128)
    stage_bytes = 2 * block_k * (2 * block_n + MAX_ROWS)
    # Half of an SM's memory each: one program's last tiles overlap with the other's first.
    num_stages = max(2, min(5, (device.shared_bytes // 2 - _ROOM) // stage_bytes))
    return replace(GatedProductConfig(block_n, block_k, 4, num_stages), **(measured or {}))


def can_fuse(x: Tensor, packed: Tensor) -> bool:
    """Whether `gated_product` is for this step: few rows, of 16-bit elements, and nothing slower was measured."""
    is_narrow = x.shape[0] <= MAX_ROWS and x.element_size() == 2
    # Rows must begin at multiples of 16 bytes, or they cannot be copied to shared memory without passing registers.
    is_aligned = x.stride(1) == 1 and packed.is_contiguous() and packed.shape[1] % 8 == 0
    return is_narrow and is_aligned and _config(x, packed).is_fused


def _config(x: Tensor, packed: Tensor) -> GatedProductConfig:
    size, in_features = packed.shape[0] // 2, packed.shape[1]
    measured = tuned("gated_product", (size, in_features), x.device)
    return gated_product_config(size, device_traits(x.device), measured)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_product_kernel(
    out_ptr,  # [T, I], contiguous
    x_ptr,  # [T, K]
    weight_ptr,  # [2 * I, K], contiguous: gates, then ups
    bias_ptr,  # [2 * I] or None
    num_rows,
    stride_xt,
    SIZE: tl.constexpr,  # I
    IN_FEATURES: tl.constexpr,  # K
    IS_SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, inputs = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    is_output, is_row = outputs < SIZE, rows < num_rows
    # The last program's rows past the end would be those of other halves, or nobody's: it reads the last one again.
    known = tl.minimum(outputs, SIZE - 1).to(tl.int64)
    gate_ptrs = weight_ptr + known[:, None] * IN_FEATURES + inputs[None, :]
    up_ptrs = gate_ptrs + SIZE * IN_FEATURES
    x_ptrs = x_ptr + rows[None, :] * stride_xt + inputs[:, None]
    gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_K):
        if IN_FEATURES % BLOCK_K == 0:
            x = tl.load(x_ptrs + start, mask=is_row[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs + start, eviction_policy="evict_first")
            up_weight = tl.load(up_ptrs + start, eviction_policy="evict_first")
        else:
            is_input = inputs < IN_FEATURES - start
            x = tl.load(x_ptrs + start, mask=is_row[None, :] & is_input[:, None], other=0.0)
            gate_weight = tl.load(gate_ptrs + start, mask=is_input[None, :], other=0.0)
            up_weight = tl.load(up_ptrs + start, mask=is_input[None, :], other=0.0)
        gate = tl.dot(gate_weight, x, gate)
        up = tl.dot(up_weight, x, up)
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + known).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + SIZE + known).to(tl.float32)[:, None]
    # Rounded where two launches would have been, so that a row's bits hardly depend on which way it went.
    dtype = out_ptr.dtype.element_ty
    out = activated(gate.to(dtype), up.to(dtype), IS_SILU)
    out_ptrs = out_ptr + rows[None, :].to(tl.int64) * SIZE + outputs[:, None]
    tl.store(out_ptrs, out, mask=is_row[None, :] & is_output[:, None])


def gated_product(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> None:
    """out [T, I] = act(first half) * second half of x @ weight.T + bias; for what `can_fuse` says yes to."""
    num_rows, size = out.shape
    config = _config(x, packed)
    launch(
        _gated_product_kernel,
        (cdiv(size, config.block_n) if num_rows else 0,),
        out,
        x,
        packed,
        bias,
        num_rows,
        x.stride(0) if num_rows > 1 else x.shape[1],  # that of a single row means nothing, and must make no variant
        **_constexprs(size, x.shape[1], activation == "silu", config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _constexprs(size: int, in_features: int, is_silu: bool, config: GatedProductConfig) -> dict[str, int | bool]:
    return {
        "SIZE": size,
        "IN_FEATURES": in_features,
        "IS_SILU": is_silu,
        "BLOCK_T": MAX_ROWS,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def aot_cases() -> Iterator[AotCase]:
    """Shapes of the families we serve, and one that fits no tile, as an A100 and an H200 are given them."""
    shapes = (
        ("bf16", 14336, 4096),
        ("bf16", 4864, 896),
        ("bf16", 9216, 2304),
        ("fp16", 14336, 4096),
        ("bf16", 855, 152),
    )
    for dtype, size, in_features in shapes:
        for is_silu, has_bias in ((True, False), (False, True)):
            configs = [gated_product_config(size, device) for device in (A100, H200)]
            for config in dict.fromkeys(configs):
                yield _aot_case(config, dtype, size, in_features, is_silu, has_bias)


def _aot_case(
    config: GatedProductConfig, dtype: str, size: int, in_features: int, is_silu: bool, has_bias: bool
) -> AotCase:
    pointer = f"*{dtype}"
    signature = {"out_ptr": pointer, "x_ptr": pointer, "weight_ptr": pointer, "num_rows": "i32"}
    signature["stride_xt"] = "i32:16" if in_features % 16 == 0 else "i32"
    constexprs: dict[str, object] = dict(_constexprs(size, in_features, is_silu, config))
    if has_bias:
        signature["bias_ptr"] = pointer
    else:
        constexprs["bias_ptr"] = None
    name = f"gated_product/{dtype}/{size}x{in_features}/{'silu' if is_silu else 'gelu_tanh'}"
    name += f"{'/bias' if has_bias else ''}/n{config.block_n}k{config.block_k}s{config.num_stages}"
    stages = config.num_stages
    return AotCase(name, _gated_product_kernel, signature, constexprs, config.num_warps, stages, is_decode=True)
