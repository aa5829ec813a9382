# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalization, alone and fused with the residual addition before it."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation
from wavetrain_kernels.ops.quantized_inputs import new_inputs
from wavetrain_kernels.packed_weight import PackedWeight
from wavetrain_kernels.quantized_inputs import Rows

# H = size of the normalized dimension.


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, inputs_for: None = None
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, inputs_for: PackedWeight | None
) -> Rows: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, inputs_for: PackedWeight | None = None
) -> Rows:
    """Scales every row of x [..., H] to unit root-mean-square, then by weight [H] + weight_offset.

    Accumulates in float32 whatever the input dtype. Without an offset the normalized row is rounded to x's dtype
    before the weight product, as Llama has it; with one (Gemma: 1.0) the product is taken in float32.

    Args:
        inputs_for: the weight that will read the result, and it alone: it may come as that weight's kernels want it.

    Raises:
        ShapeError: x has no dimension, or its last one differs from the weight's.
        DtypeError: x is not floating point, or weight has another dtype.
    """
    _check(x, weight)
    kernels = implementation(x.device)
    rounded = new_inputs(kernels, x.shape, x.dtype, inputs_for)
    if rounded is not None:
        rounded.kernels.rms_norm(rounded.rows, x, weight, eps, weight_offset)
        return rounded.rows
    out = kernels.empty(x.shape, x.dtype, x.device)
    kernels.rms_norm(out, x, weight, eps, weight_offset)
    return out


@overload
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, inputs_for: None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    inputs_for: PackedWeight | None,
) -> tuple[Rows, Tensor]: ...
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    inputs_for: PackedWeight | None = None,
) -> tuple[Rows, Tensor]:
    """Returns (rms_norm(x + residual), x + residual); the sum is rounded to x's dtype first. Inputs are left alone.

    Raises:
        ShapeError: as `rms_norm`, or x and residual differ in shape.
        DtypeError: as `rms_norm`, or x and residual differ in dtype.
    """
    _check(x, weight)
    if residual.shape != x.shape:
        raise ShapeError(f"x and residual must have one shape, got {list(x.shape)} and {list(residual.shape)}")
    if residual.dtype != x.dtype:
        raise DtypeError(f"x and residual must have one dtype, got {x.dtype} and {residual.dtype}")
    kernels = implementation(x.device)
    residual_out = kernels.empty(x.shape, x.dtype, x.device)
    rounded = new_inputs(kernels, x.shape, x.dtype, inputs_for)
    if rounded is not None:
        rounded.kernels.add_rms_norm(rounded.rows, residual_out, x, residual, weight, eps, weight_offset)
        return rounded.rows, residual_out
    out = kernels.empty(x.shape, x.dtype, x.device)
    kernels.add_rms_norm(out, residual_out, x, residual, weight, eps, weight_offset)
    return out, residual_out


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ShapeError(f"x must be [..., H] and weight [H], got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point() or weight.dtype != x.dtype:
        raise DtypeError(f"x and weight must have one floating-point dtype, got {x.dtype} and {weight.dtype}")
