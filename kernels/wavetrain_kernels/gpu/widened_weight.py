# SPDX-License-Identifier: Apache-2.0
"""A packed quantized weight as a dense one, for a step of so many rows that cuBLAS is worth the way through memory."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, launch
from wavetrain_kernels.gpu.quantized_packing import PackedQuantized, QuantizedShape
from wavetrain_kernels.quantized_weight import QuantizationScheme

# N = outputs, K = inputs, G = groups of inputs.

_BLOCK_N = 32
_NUM_WARPS = 4


# The sign bits of 16-bit halves and of bytes, 0x80008000 and 0x80808080, as 32-bit integers have them.
_HALF_SIGNS = tl.constexpr(-0x7FFF8000)
_BYTE_SIGNS = tl.constexpr(-0x7F7F7F80)


@triton.jit
def widened(  # noqa: ANN201
    words, zero, codebook_ptr, dtype: tl.constexpr,
    VALUES: tl.constexpr, MIDDLE: tl.constexpr, HAS_CODEBOOK: tl.constexpr, HAS_ZEROS: tl.constexpr,
    PLANE_INDEX: tl.constexpr, BLOCK_N: tl.constexpr, PLANE: tl.constexpr,
):  # fmt: skip
    """Words [N, PLANE / 2] → values of one of their stretches [N, PLANE], times the unit of their type."""
    is_bf16: tl.constexpr = dtype == tl.bfloat16
    if VALUES == "fp8":
        # e4m3's bits at the place of the other type's are the same number but for a power of two.
        halves = words << 8 if PLANE_INDEX == 0 else words
        if is_bf16:
            halves = (halves & _HALF_SIGNS) | ((halves >> 4) & 0x07F007F0)
        else:
            halves = (halves & _HALF_SIGNS) | ((halves >> 1) & 0x3F803F80)
    elif VALUES == "int8":
        halves = ((words ^ _BYTE_SIGNS) >> (8 * PLANE_INDEX)) & 0x00FF00FF  # counted from the lowest
    else:
        halves = (words >> (4 * PLANE_INDEX)) & 0x000F000F
    if HAS_CODEBOOK:
        low, high = tl.load(codebook_ptr + (halves & 15)), tl.load(codebook_ptr + (halves >> 16))
    else:
        low = halves.to(tl.int16).to(dtype, bitcast=True)
        high = (halves >> 16).to(tl.int16).to(dtype, bitcast=True)
    values = tl.reshape(tl.join(low, high), (BLOCK_N, PLANE))
    if VALUES == "fp8":
        if is_bf16:
            values = values * 1.329227995784916e36  # 2 ** 120
        if HAS_ZEROS:
            values = values - zero
    elif HAS_CODEBOOK:
        if HAS_ZEROS:
            values = values - zero
    elif is_bf16:
        # 2 ** 127 times the smallest number, 2 ** -133, is the unit: one fused multiplication and addition, and exact.
        values = values * 1.7014118346046923e38 - (zero if HAS_ZEROS else MIDDLE * 0.015625)
    else:
        values = values * 32768.0 - (zero if HAS_ZEROS else MIDDLE * 0.001953125)  # 2 ** 15 times 2 ** -24
    return values


@triton.jit
def _widen_kernel(
    out_ptr,  # [N, K], contiguous
    words_ptr,  # [N, NUM_BLOCKS * PLANE / 2], contiguous
    scales_ptr,  # [G, N], contiguous
    zeros_ptr,  # [G, N], contiguous, or None
    codebook_ptr,  # [16] or None
    SIZE: tl.constexpr,  # N
    IN_FEATURES: tl.constexpr,  # K
    NUM_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale; 0: all
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    VALUES: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < SIZE
    words_at = rows[:, None].to(tl.int64) * (NUM_BLOCKS * (PLANE // 2)) + tl.arange(0, PLANE // 2)[None, :]
    words = tl.load(words_ptr + words_at + block * (PLANE // 2), mask=is_row[:, None], other=0)
    for i in tl.static_range(PLANES):  # pyright: ignore[reportGeneralTypeIssues]
        inputs = (block * PLANES + i) * PLANE + tl.arange(0, PLANE)
        # A stretch past the end has no group of its own.
        group = tl.minimum((block * PLANES + i) * PLANE, IN_FEATURES - 1) // GROUP if GROUP else 0
        scale = tl.load(scales_ptr + group * SIZE + rows, mask=is_row, other=0.0)
        zero = 0.0
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + group * SIZE + rows, mask=is_row, other=0.0)[:, None].to(dtype)
        values = widened(
            words, zero, codebook_ptr, dtype, VALUES, MIDDLE, codebook_ptr is not None, zeros_ptr is not None, i,
            BLOCK_N, PLANE,
        )  # fmt: skip
        out = (values.to(tl.float32) * scale[:, None]).to(dtype)
        is_there = is_row[:, None] & (inputs < IN_FEATURES)[None, :]
        tl.store(out_ptr + rows[:, None].to(tl.int64) * IN_FEATURES + inputs[None, :], out, mask=is_there)


def widen_weight(packed: PackedQuantized) -> Tensor:
    """Returns the weight [N, K] in the inputs' type, rows and columns in the order they are packed in.

    Of torch's allocator: as large as any dense weight, and free for the next layer right after.
    """
    shape = packed.shape
    out = packed.words.new_empty((shape.out_features, shape.in_features), dtype=packed.dtype)
    launch(
        _widen_kernel,
        (cdiv(shape.out_features, _BLOCK_N), shape.num_blocks),
        out,
        packed.words,
        packed.scales,
        packed.zeros,
        packed.codebook,
        **_constexprs(shape),
        num_warps=_NUM_WARPS,
    )
    return out


def _constexprs(shape: QuantizedShape) -> dict[str, int | float | str]:
    return {
        "SIZE": shape.out_features,
        "IN_FEATURES": shape.in_features,
        "NUM_BLOCKS": shape.num_blocks,
        "GROUP": shape.group_size,
        "PLANE": shape.plane,
        "PLANES": shape.planes,
        "VALUES": shape.values,
        "MIDDLE": shape.middle,
        "BLOCK_N": _BLOCK_N,
    }


def aot_cases() -> Iterator[AotCase]:
    """A scheme of each kind of values."""
    for name, scheme in (
        ("w4g128", QuantizationScheme(values="int4", group_size=128)),
        ("nf4g64", QuantizationScheme(values="int4", group_size=64, has_codebook=True)),
        ("w8", QuantizationScheme(values="int8", group_size=4096)),
        ("fp8g128", QuantizationScheme(values="fp8", group_size=128)),
    ):
        for dtype in ("bf16", "fp16"):
            pointer = f"*{dtype}"
            signature = {"out_ptr": pointer, "words_ptr": "*i32", "scales_ptr": "*fp32", "zeros_ptr": "*fp32"}
            constexprs: dict[str, object] = dict(_constexprs(QuantizedShape.of(scheme, 4096, 4096)))
            if scheme.has_codebook:
                signature["codebook_ptr"] = pointer
            else:
                constexprs["codebook_ptr"] = None
            yield AotCase(f"widen/{name}/{dtype}", _widen_kernel, signature, constexprs, _NUM_WARPS, 1)
