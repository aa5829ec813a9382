# SPDX-License-Identifier: Apache-2.0
"""A linear layer's weight in few bits: the one form that every checkpoint format is read into, and every kernel packs.

    weight[n, k] = code(values[n, k]) * scales[n // block_rows, g] - offsets[n // block_rows, g],   g = k // group_size

A zero point z of a checkpoint is the offset z * scale: kernels then need one product and one subtraction, whatever the
format, and formats whose minimum is no multiple of the scale (GGUF's K quants) fit in too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError

# N = outputs, K = inputs, G = groups of inputs.

ValueFormat = Literal["int4", "int8", "fp8"]
InputFormat = Literal["int8", "fp8"]

_VALUE_DTYPES = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_NUM_CODES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationScheme:
    """What kernels must know of a quantized weight beside its numbers; weights of one scheme can be stacked by rows.

    Attributes:
        values: of the weight: `int4` from -8 to 7, `int8`, `fp8`: e4m3.
        group_size: inputs that share a scale; a multiple of 16, or all of them.
        block_rows: outputs that share a scale: 1, or 128 in block-scaled fp8.
        has_offsets: zero points or minima.
        has_codebook: an int4 value v stands for the number codebook[v + 8] (nf4).
        is_reordered: inputs are grouped in another order than they come in (act-order).
        inputs: what a row of inputs is rounded to before it is multiplied; None: it is not. A kernel set may keep
            inputs finer than this asks for.
        input_group_size: inputs that share a scale of theirs, in the order of the values; None: one scale for each row.
        has_input_scale: the scale of the inputs is known beforehand, one for all, and not found for each row.
    """

    values: ValueFormat
    group_size: int
    block_rows: int = 1
    has_offsets: bool = False
    has_codebook: bool = False
    is_reordered: bool = False
    inputs: InputFormat | None = None
    input_group_size: int | None = None
    has_input_scale: bool = False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedWeight:
    """A weight [N, K] as checkpoints are read into it, not yet packed for a device's kernels.

    Attributes:
        values: [N, K] int8 or float8_e4m3fn; int4: [N, ceil(K / 2)] uint8, inputs 2j and 2j + 1 in the low and the high
            half of byte j, each plus 8.
        scales: [ceil(N / block_rows), G] float32, G = ceil(K / group_size).
        offsets: as scales.
        codebook: [16] float32.
        column_order: [K] int64, a permutation: column k of the values multiplies input column_order[k].
        input_scale: [1] float32.
    """

    scheme: QuantizationScheme
    in_features: int
    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    codebook: Tensor | None = None
    column_order: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        scheme = self.scheme
        columns = -(-self.in_features // 2) if scheme.values == "int4" else self.in_features
        if self.values.dim() != 2 or self.values.shape[1] != columns:
            raise ShapeError(f"values must be [N, {columns}], got {list(self.values.shape)}")
        _check_dtype("values", self.values, _VALUE_DTYPES[scheme.values])
        grid = (-(-self.out_features // scheme.block_rows), -(-self.in_features // scheme.group_size))
        _check("scales", self.scales, grid, torch.float32)
        _check_optional("offsets", self.offsets, grid, torch.float32, is_there=scheme.has_offsets)
        _check_optional("codebook", self.codebook, (_NUM_CODES,), torch.float32, is_there=scheme.has_codebook)
        order = (self.in_features,)
        _check_optional("column_order", self.column_order, order, torch.int64, is_there=scheme.is_reordered)
        _check_optional("input_scale", self.input_scale, (1,), torch.float32, is_there=scheme.has_input_scale)

    @property
    def out_features(self) -> int:
        """N."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.values.device

    @property
    def num_bytes(self) -> int:
        """That its tensors take."""
        tensors = (self.values, self.scales, self.offsets, self.codebook, self.column_order, self.input_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def is_alike(scheme: QuantizationScheme, other: QuantizationScheme) -> bool:
    """Whether weights of both may be experts of one projection: equal, but for what a single one may have or lack.

    That is offsets, and an order of its inputs: files leave out those that change nothing.
    """
    return replace(scheme, has_offsets=False, is_reordered=False) == replace(
        other, has_offsets=False, is_reordered=False
    )


def can_stack(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether the weights can be one with the rows of all: of one scheme, and alike in what it holds once."""
    first = weights[0]
    return all(
        weight.scheme == first.scheme
        and weight.in_features == first.in_features
        and _is_equal(weight.column_order, first.column_order)
        and _is_equal(weight.codebook, first.codebook)
        and _is_equal(weight.input_scale, first.input_scale)
        for weight in weights
    ) and all(weight.out_features % first.scheme.block_rows == 0 for weight in weights[:-1])


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Returns one weight with the rows of all, in their order.

    Raises:
        ShapeError: they cannot be stacked.
    """
    if not can_stack(weights):
        raise ShapeError("weights of different schemes cannot be one")
    first = weights[0]
    return QuantizedWeight(
        scheme=first.scheme,
        in_features=first.in_features,
        values=torch.cat([weight.values for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        offsets=torch.cat([weight.offsets for weight in weights if weight.offsets is not None])
        if first.scheme.has_offsets
        else None,
        codebook=first.codebook,
        column_order=first.column_order,
        input_scale=first.input_scale,
    )


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _check_optional(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *, is_there: bool
) -> None:
    if (tensor is not None) != is_there:
        raise ShapeError(f"{name} must {'' if is_there else 'not '}be given with this scheme")
    if tensor is not None:
        _check(name, tensor, shape, dtype)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    _check_dtype(name, tensor, dtype)


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise DtypeError(f"{name} must be {dtype}, got {tensor.dtype}")
