# SPDX-License-Identifier: Apache-2.0
"""Rows rounded to 8 bits as a weight's scheme wants its inputs: as they are, behind a norm, or behind a gate.

One kernel for all three, so that no row passes through memory in 16 bits only to be rounded. What it rounds is what
the norm or gate would have stored: fused or not, the bits are the same. A program takes a whole row and keeps it in
registers. Rows are stored as the packed weight is: the two halves of every 128 inputs interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.activation import activated
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import device_traits, launch, next_power_of_2
from wavetrain_kernels.gpu.quantized_experts import QuantizedExperts
from wavetrain_kernels.gpu.quantized_packing import PackedQuantized
from wavetrain_kernels.quantized_inputs import QuantizedInputs

# T = rows, K = inputs, G = groups of inputs.

# Up to so many rows a weight is widened instead, and its inputs stay as they are.
MOST_WIDENED = 64
_BLOCK = 128  # inputs whose halves are interleaved, and that may share a scale
_MAX_SIZE = 16384  # a row must fit into the registers of one program
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def takes_quantized(packed: PackedQuantized | QuantizedExperts) -> bool:
    """Whether there is a product of the weight, or of experts' weights, with 8-bit rows, on its device."""
    scheme, shape = packed.scheme, packed.shape
    if scheme.inputs is None or scheme.inputs != scheme.values:
        return False
    if scheme.inputs == "fp8" and device_traits(packed.words.device).capability < (8, 9):
        return False  # no such matrix instructions
    is_plain = packed.zeros is None and packed.column_order is None
    groups = (shape.group_size, _input_group(packed))
    return is_plain and shape.block_k == _BLOCK and set(groups) <= {0, _BLOCK}


def _input_group(packed: PackedQuantized | QuantizedExperts) -> int:
    group = packed.scheme.input_group_size
    return 0 if group is None or group >= packed.shape.in_features else group


def new_inputs(packed: PackedQuantized, num_rows: int) -> QuantizedInputs | None:
    """Returns rows to be filled for a step of so many; None where the weight takes them as they are."""
    shape = packed.shape
    if num_rows <= MOST_WIDENED or shape.in_features > _MAX_SIZE or not takes_quantized(packed):
        return None
    return _inputs_for(packed, num_rows, packed.input_scale)


def expert_inputs(experts: QuantizedExperts, x: Tensor) -> QuantizedInputs | None:
    """Returns rows of x rounded for any of the experts; None where these take them as they are.

    Each has the scale that it needs, also where experts know scales beforehand: they are not alike.
    """
    if experts.shape.in_features > _MAX_SIZE or not takes_quantized(experts):
        return None
    rows = _inputs_for(experts, x.shape[0], None)
    quantize_rows(rows, x)
    return rows


def _inputs_for(
    packed: PackedQuantized | QuantizedExperts, num_rows: int, static_scale: Tensor | None
) -> QuantizedInputs:
    shape, inputs = packed.shape, packed.scheme.inputs
    assert inputs is not None, "it takes 8-bit rows"
    width = shape.num_blocks * shape.block_k
    num_groups = shape.num_blocks if _input_group(packed) else 1
    return QuantizedInputs(
        packed=packed,
        values=packed.words.new_empty((num_rows, width), dtype=_DTYPES[inputs]),
        scales=packed.scales.new_empty((num_rows, num_groups)),
        static_scale=static_scale,
        in_features=shape.in_features,
        dtype=packed.dtype,
    )


@triton.jit
def _int8_bits(x):
    """The integers nearest to float32 x, ties to even: as they are in the lowest bits of 1.5 * 2 ** 23 and more."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _fp8_bits(x):
    """The bits of e4m3 numbers nearest to float32 x, ties to even; |x| up to 448.

    In integers: before sm_89 Triton has no such type, and its interpreter (3.6) rounds to it wrongly.
    """
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 8 * 120
    # Below 2 ** -6 the numbers lie 2 ** -9 apart, as integers do.
    small = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(size < 0.015625, small, normal)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["eps", "weight_offset"])
def _quantize_rows_kernel(
    values_ptr,  # [T, BLOCKS * 128], contiguous; int8, or uint8: the bits of fp8
    scales_ptr,  # [T, G], contiguous
    residual_out_ptr,  # [T, K], contiguous; None without ADDS
    x_ptr,  # [T, K]; [T, K, 2] with IS_GATED
    residual_ptr,  # [T, K]; None without ADDS
    weight_ptr,  # [K]; None without NORMS
    static_scale_ptr,  # [1]; None: from each row
    eps,
    weight_offset,
    stride_xt,
    stride_rt,
    SIZE: tl.constexpr,  # K
    BLOCKS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    NORMS: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SILU: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK_B)[:, None, None]
    halves, places = tl.arange(0, 2)[None, :, None], tl.arange(0, 64)[None, None, :]
    columns = blocks * 128 + halves * 64 + places
    is_there = columns < SIZE
    if IS_GATED:
        gates = x_ptr + row * stride_xt + 2 * columns
        gate = tl.load(gates, mask=is_there, other=0.0)
        x = activated(gate, tl.load(gates + 1, mask=is_there, other=0.0), IS_SILU)
    else:
        x = tl.load(x_ptr + row * stride_xt + columns, mask=is_there, other=0.0)
    if ADDS:
        residual = tl.load(residual_ptr + row * stride_rt + columns, mask=is_there, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_out_ptr + row * SIZE + columns, x, mask=is_there)
    wide = x.to(tl.float32)
    if NORMS:
        weight = tl.load(weight_ptr + columns, mask=is_there, other=0.0).to(tl.float32)
        squares = tl.reshape(wide * wide, (BLOCK_B * 128,))
        wide = wide * tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)
        # The rounding orders of the norm that is not fused.
        out = wide * (weight + weight_offset) if HAS_OFFSET else wide.to(x.dtype).to(tl.float32) * weight
        wide = out.to(x.dtype).to(tl.float32)
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    largest = 127.0 if dtype == tl.int8 else 448.0
    # No number: a scale without bounds, so that the product is none either.
    magnitudes = tl.reshape(tl.where(wide == wide, tl.abs(wide), float("inf")), (BLOCK_B, 128))
    if IS_GROUPED:
        peak = tl.max(magnitudes, axis=1)
    else:
        peak = tl.max(tl.reshape(magnitudes, (BLOCK_B * 128,)), axis=0) + tl.zeros((BLOCK_B,), tl.float32)
    if static_scale_ptr is not None:
        scale = tl.load(static_scale_ptr) + tl.zeros((BLOCK_B,), tl.float32)
    else:
        scale = tl.where(peak == 0.0, 1.0, peak / largest)
    num_groups = BLOCKS if IS_GROUPED else 1
    groups = tl.arange(0, BLOCK_B)
    tl.store(scales_ptr + row * num_groups + groups, scale, mask=groups < num_groups)
    scaled = tl.clamp(wide / scale[:, None, None], -largest, largest)
    rounded = tl.permute(_int8_bits(scaled) if dtype == tl.int8 else _fp8_bits(scaled), (0, 2, 1))
    at = tl.arange(0, BLOCK_B)[:, None, None] * 128 + tl.arange(0, 64)[None, :, None] * 2
    at += tl.arange(0, 2)[None, None, :]
    tl.store(values_ptr + row * (BLOCKS * 128) + at, rounded, mask=at < BLOCKS * 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """The norm in front: x / rms(x) * (weight + offset), of x + residual where there is one."""

    weight: Tensor
    eps: float
    offset: float
    residual: Tensor | None = None
    residual_out: Tensor | None = None


def quantize_rows(out: QuantizedInputs, x: Tensor, *, norm: Norm | None = None, activation: str | None = None) -> None:
    """Fills `out` with the rows of x [T, K], behind a norm; or of x [T, 2 K], each gate beside what it gates."""
    num_rows, size, width = x.shape[0], out.in_features, out.values.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = None if norm is None or norm.residual is None else norm.residual
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    launch(
        _quantize_rows_kernel,
        (num_rows,),
        out.values if out.values.dtype == torch.int8 else out.values.view(torch.uint8),
        out.scales,
        None if norm is None else norm.residual_out,
        x,
        residual,
        None if norm is None else norm.weight.contiguous(),
        out.static_scale,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        # The stride of a dimension of size 1 means nothing; whatever it is, it must not make another variant.
        x.stride(0) if num_rows > 1 else x.shape[1],
        residual.stride(0) if residual is not None and num_rows > 1 else size,
        **_constexprs(size, width, out.scales.shape[1] > 1, norm, activation),
        num_warps=_num_warps(width),
    )


def rms_norm(out: QuantizedInputs, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> None:
    """out = the rows of x / rms(x) * (weight + weight_offset), rounded."""
    quantize_rows(out, x, norm=Norm(weight=weight, eps=eps, offset=weight_offset))


def add_rms_norm(
    out: QuantizedInputs,
    residual_out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
) -> None:
    """residual_out = x + residual, rounded to their type; out = rms_norm(residual_out)."""
    norm = Norm(weight=weight, eps=eps, offset=weight_offset, residual=residual, residual_out=residual_out)
    quantize_rows(out, x, norm=norm)


def _constexprs(
    size: int, width: int, is_grouped: bool, norm: Norm | None, activation: str | None
) -> dict[str, int | bool]:
    return {
        "SIZE": size,
        "BLOCKS": width // _BLOCK,
        "IS_GROUPED": is_grouped,
        "NORMS": norm is not None,
        "ADDS": norm is not None and norm.residual is not None,
        "HAS_OFFSET": norm is not None and norm.offset != 0.0,
        "IS_GATED": activation is not None,
        "IS_SILU": activation == "silu",
        "BLOCK_B": next_power_of_2(width // _BLOCK),
    }


def _num_warps(width: int) -> int:
    """Eight elements a thread: one 16-byte load in 16-bit types. Beyond 16 warps their reduction costs."""
    return min(max(next_power_of_2(width) // 256, 2), 16)


def aot_cases() -> Iterator[AotCase]:
    """A hidden size behind a norm, an intermediate one behind a gate, both alone; with int8 and fp8 rows."""
    scratch = torch.empty(0)
    plain, adding = (
        Norm(weight=scratch, eps=0.0, offset=0.0),
        Norm(weight=scratch, eps=0.0, offset=1.0, residual=scratch),
    )
    for values in ("i8", "u8"):
        for name, size, norm, activation, is_grouped in (
            ("rows", 4096, None, None, False),
            ("rows", 14336, None, None, True),
            ("norm", 4096, plain, None, True),
            ("add_norm", 4096, adding, None, False),
            ("gate", 14336, None, "silu", False),
            ("gate", 855, None, "gelu_tanh", True),
        ):
            width = -(-size // _BLOCK) * _BLOCK
            constexprs: dict[str, object] = dict(_constexprs(size, width, is_grouped, norm, activation))
            stride = "i32:16" if size % 16 == 0 else "i32"
            signature = {"values_ptr": f"*{values}", "scales_ptr": "*fp32", "x_ptr": "*bf16"}
            signature |= {"eps": "fp32", "weight_offset": "fp32", "stride_xt": stride, "stride_rt": stride}
            optional = {
                "residual_out_ptr": norm is adding,
                "residual_ptr": norm is adding,
                "weight_ptr": norm is not None,
                "static_scale_ptr": False,
            }
            for pointer, is_there in optional.items():
                if is_there:
                    signature[pointer] = "*bf16"
                else:
                    constexprs[pointer] = None
            kind = f"{values}/{name}/{size}{'/grouped' if is_grouped else ''}"
            yield AotCase(
                f"quantize/{kind}",
                _quantize_rows_kernel,
                signature,
                constexprs,
                _num_warps(width),
                1,
                is_decode=size <= 4096,  # wider rows may spill a register: many rows, each read once
            )
