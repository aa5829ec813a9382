# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as the GPU's kernels read them: repacked once, at load.

Rows are cut into blocks of `planes` stretches of `plane` inputs each, 4 stretches of 4-bit values or 2 of 8-bit ones,
which lie on top of each other: 32-bit word j of a block has the values 2j and 2j + 1 of every stretch, the even ones
in its lower half. A shift and a mask then leave two neighbours of one stretch in the two halves of a register, as
matrix instructions want 16-bit elements: nothing has to be moved between threads, or within one. With 8-bit values
this is the same as the two halves of a block interleaved byte by byte, so a block can be multiplied as bytes too, by
inputs that are interleaved alike.

Values are turned into 16-bit floats without a conversion. The bits of a small integer u are, read as a 16-bit float,
u times the smallest number of that type, and one fused multiplication and addition makes it (u - 8) * unit, exactly.
`unit` is divided out of the scales here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_kernels.gpu.launch import cdiv, device_traits
from wavetrain_kernels.quantized_weight import QuantizationScheme, QuantizedWeight, ValueFormat

# N = outputs, K = inputs, B = blocks of a row, G = groups of inputs.

DTYPES = (torch.bfloat16, torch.float16)
_PLANES = (64, 32, 16)  # 128 bytes of 16-bit inputs are a line of shared memory; 16 a matrix instruction's least
_MIDDLE = {"int4": 8.0, "int8": 128.0, "fp8": 0.0}
# What stands for a scale of 0 is so much smaller than its offset: no value times it is seen beside that.
_NO_SCALE = 2.0**-14


@dataclass(frozen=True, slots=True)
class QuantizedShape:
    """What launches depend on, of a packed weight.

    Attributes:
        group_size: inputs that share a scale; 0: all.
        plane: inputs of a stretch.
    """

    values: ValueFormat
    out_features: int
    in_features: int
    group_size: int
    plane: int
    has_codebook: bool

    @classmethod
    def of(cls, scheme: QuantizationScheme, out_features: int, in_features: int) -> QuantizedShape:
        """Returns the shape that a weight is packed in: its stretches are the longest that divide a group."""
        group = 0 if scheme.group_size >= in_features else scheme.group_size
        plane = next(length for length in _PLANES if group % length == 0)
        return cls(scheme.values, out_features, in_features, group, plane, scheme.has_codebook)

    @property
    def planes(self) -> int:
        """Stretches of a block: as many values as a 16-bit half of a word has."""
        return 16 // self.bits

    @property
    def block_k(self) -> int:
        """Inputs of a block."""
        return self.plane * self.planes

    @property
    def together(self) -> int:
        """Stretches of a block that are of one group."""
        if self.group_size % self.block_k == 0:
            return self.planes
        return self.group_size // self.plane if self.block_k % self.group_size == 0 else 1

    @property
    def num_blocks(self) -> int:
        """B."""
        return cdiv(self.in_features, self.block_k)

    @property
    def bits(self) -> int:
        """Of a value."""
        return 4 if self.values == "int4" else 8

    @property
    def middle(self) -> float:
        """What stands for 0 among the unsigned integers that values are stored as; of others, 0."""
        return 0.0 if self.has_codebook else _MIDDLE[self.values]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedQuantized:
    """The data of a PackedWeight of a quantized weight.

    Attributes:
        dtype: of the inputs that it is packed for.
        words: [N, B * plane / 2] int32. Rows of a gated weight: gate 0, what it gates, gate 1, ...
        scales: [G, N] float32, divided by `unit`.
        zeros: [G, N] float32: what is subtracted from an unsigned value times `unit`; None: the middle of the values.
        codebook: [16] of `dtype`.
        column_order: [K] int32; column k of the words multiplies input column_order[k].
        input_scale: [1] float32.
        unit: what the kernels make of a value of 1.
    """

    scheme: QuantizationScheme
    shape: QuantizedShape
    dtype: torch.dtype
    is_gated: bool
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    codebook: Tensor | None
    column_order: Tensor | None
    input_scale: Tensor | None
    unit: float


def value_unit(scheme: QuantizationScheme, dtype: torch.dtype) -> float:
    """Returns what the kernels make of a value of 1."""
    if scheme.has_codebook:
        return 1.0
    if scheme.values == "fp8":
        return 1.0 if dtype == torch.bfloat16 else 2.0**-8
    return 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9


def can_pack(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether there are kernels for the scheme with such inputs."""
    if weight.scheme.has_codebook and device_traits(weight.device).capability[0] >= 10:
        return False  # Triton 3.6 does not compile the look-up beside Blackwell's matrix instructions
    is_whole = weight.scheme.group_size >= weight.in_features
    return dtype in DTYPES and (is_whole or weight.scheme.group_size % _PLANES[-1] == 0)


def pack(weight: QuantizedWeight, dtype: torch.dtype, is_gated: bool) -> PackedQuantized:
    """Returns the weight for inputs of `dtype`; for what `can_pack` says yes to."""
    shape = QuantizedShape.of(weight.scheme, weight.out_features, weight.in_features)
    unit = value_unit(weight.scheme, dtype)
    words, (scales, zeros) = _words(weight, shape), _affine(weight, shape.middle, unit)
    if is_gated:
        words, scales, zeros = _paired(words), _paired(scales), None if zeros is None else _paired(zeros)
    order = weight.column_order
    return PackedQuantized(
        scheme=weight.scheme,
        shape=shape,
        dtype=dtype,
        is_gated=is_gated,
        words=words,
        scales=scales.t().contiguous(),
        zeros=None if zeros is None else zeros.t().contiguous(),
        codebook=None if weight.codebook is None else weight.codebook.to(dtype),
        column_order=None if order is None else order.to(torch.int32),
        input_scale=weight.input_scale,
        unit=unit,
    )


def _affine(weight: QuantizedWeight, middle: float, unit: float) -> tuple[Tensor, Tensor | None]:
    """Returns scales and zeros of each row [N, G]: weight = (unsigned value * unit - zero) * scale."""
    scales, offsets = (_each_row(grid, weight) for grid in (weight.scales, weight.offsets))
    assert scales is not None, "every scheme has scales"
    if offsets is None:
        return scales / unit, None
    scales = torch.where((scales == 0) & (offsets != 0), offsets.abs() * _NO_SCALE, scales)
    return scales / unit, (middle + offsets / torch.where(scales == 0, 1.0, scales)) * unit


def _each_row(grid: Tensor | None, weight: QuantizedWeight) -> Tensor | None:
    return None if grid is None else grid.repeat_interleave(weight.scheme.block_rows, 0)[: weight.out_features]


def _paired(rows: Tensor) -> Tensor:
    """Gates, then what they gate → each gate beside what it gates."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def _words(weight: QuantizedWeight, shape: QuantizedShape) -> Tensor:
    num_rows, padding = weight.out_features, -weight.in_features % shape.block_k
    if shape.values == "int4":
        nibbles = torch.stack((weight.values & 15, weight.values >> 4), dim=-1).flatten(1)[:, : weight.in_features]
        nibbles = torch.nn.functional.pad(nibbles, (0, padding)).view(num_rows, -1, 2, 2, shape.plane)
        octets = nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << 4
    else:
        octets = torch.nn.functional.pad(weight.values.view(torch.uint8), (0, padding))
        octets = octets.view(num_rows, -1, 2, shape.plane)
    return octets.transpose(-1, -2).contiguous().view(num_rows, -1).view(torch.int32)
