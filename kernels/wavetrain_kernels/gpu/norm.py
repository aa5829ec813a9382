# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalization, alone and fused with the residual addition before it: one launch each.

A program takes whole rows and keeps them in registers, so each is read once: bound by memory in prefill and by the
launch in decode. Rows of up to 256 elements (heads) share a program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import TRITON_TYPES, cdiv, fall_back, launch, next_power_of_2
from wavetrain_kernels.reference import norm as reference

# N = rows: tokens, or tokens times heads. H = size of the normalized dimension.

_MAX_SIZE = 16384  # a row must fit into the registers of one program


@dataclass(frozen=True, slots=True)
class NormConfig:
    """How a launch is cut into programs: each takes `block_rows` rows, of `block_size` elements with their padding."""

    block_rows: int
    block_size: int
    num_warps: int


def norm_config(size: int) -> NormConfig:
    """Returns the configuration for rows of `size` elements; of nothing else, so that a model compiles it once."""
    block_size = max(next_power_of_2(size), 16)
    if block_size <= 256:
        return NormConfig(1024 // block_size, block_size, 4)
    # Eight elements a thread: one 16-byte load of each input in 16-bit types. Beyond 16 warps their reduction costs.
    return NormConfig(1, block_size, min(max(block_size // 256, 2), 16))


@triton.jit(do_not_specialize=["eps", "weight_offset", "num_rows"])
def _rms_norm_kernel(
    out_ptr,  # [N, H], contiguous
    residual_out_ptr,  # [N, H], contiguous; None without ADDS
    x_ptr,  # [N / INNER, INNER, H]
    residual_ptr,  # [N, H]; None without ADDS
    weight_ptr,  # [H]
    eps,
    weight_offset,
    num_rows,
    stride_xo,
    stride_xi,
    stride_xh,
    stride_rn,
    stride_rh,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    is_there = (rows < num_rows) & (columns < SIZE)
    offsets = rows // INNER * stride_xo + rows % INNER * stride_xi + columns * stride_xh
    # The weight does not wait for the row, so it is asked for first.
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=is_there, other=0.0)
    if ADDS:
        residual = tl.load(residual_ptr + rows * stride_rn + columns * stride_rh, mask=is_there, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_out_ptr + rows * SIZE + columns, x, mask=is_there)
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1, keep_dims=True) / SIZE
    wide = wide * tl.rsqrt(mean_square + eps)
    # The rounding orders of the reference: Gemma's, whose weights are offsets from 1, and Llama's.
    out = wide * (weight + weight_offset) if HAS_OFFSET else wide.to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + rows * SIZE + columns, out.to(x.dtype), mask=is_there)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> None:
    """out [..., H] = x / rms(x) * (weight + weight_offset). Heads that lie apart are not copied together."""
    if not _can_serve(x):
        reference.rms_norm(out, x, weight, eps, weight_offset)
        return
    if x.dim() != 3:
        x = x.reshape(-1, 1, x.shape[-1])
    _run(out, None, x, None, weight, eps, weight_offset)


def add_rms_norm(
    out: Tensor, residual_out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> None:
    """residual_out = x + residual, rounded; out = rms_norm(residual_out)."""
    if not _can_serve(x):
        reference.add_rms_norm(out, residual_out, x, residual, weight, eps, weight_offset)
        return
    size = x.shape[-1]
    _run(out, residual_out, x.reshape(-1, 1, size), residual.reshape(-1, size), weight, eps, weight_offset)


def _can_serve(x: Tensor) -> bool:
    if x.dtype not in TRITON_TYPES:
        fall_back("rms_norm", f"{x.dtype} rows")
        return False
    if x.shape[-1] > _MAX_SIZE:
        fall_back("rms_norm", f"rows of {x.shape[-1]} elements, more than {_MAX_SIZE}")
        return False
    return True


def _run(
    out: Tensor,
    residual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_offset: float,
) -> None:
    num_outer, inner, size = x.shape
    if not size:
        return
    config = norm_config(size)
    num_rows = num_outer * inner
    # The strides of a dimension of size 1 mean nothing; whatever they are, they must not make another variant.
    stride_outer = x.stride(0) if num_outer > 1 else inner * size
    stride_inner = x.stride(1) if inner > 1 else size
    launch(
        _rms_norm_kernel,
        (cdiv(num_rows, config.block_rows),),
        out,
        residual_out,
        x,
        residual,
        weight.contiguous(),
        eps,
        weight_offset,
        num_rows,
        stride_outer,
        stride_inner,
        x.stride(2),
        residual.stride(0) if residual is not None and num_rows > 1 else size,
        1 if residual is None else residual.stride(1),
        SIZE=size,
        INNER=inner,
        ADDS=residual is not None,
        HAS_OFFSET=weight_offset != 0.0,
        BLOCK_N=config.block_rows,
        BLOCK_H=config.block_size,
        num_warps=config.num_warps,
    )


def aot_cases() -> Iterator[AotCase]:
    """Hidden sizes of the families we serve, the largest we take, one that is odd; heads of 128."""
    for size, inner in ((855, 1), (896, 1), (2304, 1), (4096, 1), (8192, 1), (_MAX_SIZE, 1), (128, 8), (80, 32)):
        for adds in (False, True) if inner == 1 else (False,):
            for has_offset in (False, True) if size == 2304 else (False,):
                yield _aot_case("bf16", size, inner, adds, has_offset)
    yield _aot_case("fp16", 4096, 1, True, False)
    yield _aot_case("fp32", 4096, 1, True, False)


def _aot_case(dtype: str, size: int, inner: int, adds: bool, has_offset: bool) -> AotCase:
    config = norm_config(size)
    pointer = f"*{dtype}"
    stride = "i32:16" if size % 16 == 0 else "i32"
    signature = dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr"), pointer)
    signature |= {"eps": "fp32", "weight_offset": "fp32", "num_rows": "i32"}
    signature |= {"stride_xo": stride, "stride_xi": stride, "stride_xh": "i32:1", "stride_rn": stride}
    signature["stride_rh"] = "i32:1"
    constexprs: dict[str, object] = {
        "SIZE": size,
        "INNER": inner,
        "ADDS": adds,
        "HAS_OFFSET": has_offset,
        "BLOCK_N": config.block_rows,
        "BLOCK_H": config.block_size,
    }
    for name in ("residual_out_ptr", "residual_ptr"):
        if adds:
            signature[name] = pointer
        else:
            constexprs[name] = None
    name = f"rms_norm/{dtype}/{size}x{inner}{'/add' if adds else ''}{'/offset' if has_offset else ''}"
    return AotCase(name, _rms_norm_kernel, signature, constexprs, config.num_warps, 1, is_decode=True)
