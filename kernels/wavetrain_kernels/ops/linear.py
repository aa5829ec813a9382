# SPDX-License-Identifier: Apache-2.0
"""Linear layers over packed weights: the matrix products of every projection."""

from __future__ import annotations

import functools
import logging
from typing import Literal, overload

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops.dispatch import implementation
from wavetrain_kernels.ops.quantized_inputs import new_inputs
from wavetrain_kernels.packed_weight import PackedWeight
from wavetrain_kernels.quantized_inputs import QuantizedInputKernels, QuantizedInputs, Rows
from wavetrain_kernels.quantized_weight import QuantizationScheme, QuantizedWeight
from wavetrain_kernels.reference.quantized_linear import dequantize

_LOG = logging.getLogger(__name__)

# T = rows.

GatedActivation = Literal["silu", "gelu_tanh"]


def pack_weight(weight: Tensor, *, is_gated: bool = False) -> PackedWeight:
    """Returns the weight [out, in] as the kernels of its device want it; it may share memory with `weight`.

    Args:
        is_gated: rows [0, out / 2) are gates of rows [out / 2, out), and the weight is for `gated_linear`.

    Raises:
        ShapeError: the weight is not [out, in], or is gated and `out` is odd.
        DtypeError: it is not floating point.
    """
    if weight.dim() != 2 or (is_gated and weight.shape[0] % 2):
        raise ShapeError(f"weight must be [out, in]{', out even' if is_gated else ''}, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise DtypeError(f"weight must be floating point, got {weight.dtype}")
    return PackedWeight(
        data=implementation(weight.device).pack_weight(weight, is_gated),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=weight.dtype,
        is_gated=is_gated,
    )


def pack_quantized(weight: QuantizedWeight, *, dtype: torch.dtype, is_gated: bool = False) -> PackedWeight:
    """Returns the quantized weight as the kernels of its device want it, for inputs of `dtype`.

    Where they have no form for its scheme it is held as a weight of `dtype`, which the log says once for each scheme.

    Args:
        is_gated: rows [0, out / 2) are gates of rows [out / 2, out), and the weight is for `gated_linear`.

    Raises:
        ShapeError: the weight is gated and its number of rows is odd.
        DtypeError: `dtype` is not floating point.
    """
    if is_gated and weight.out_features % 2:
        raise ShapeError(f"a gated weight must have an even number of rows, got {weight.out_features}")
    if not dtype.is_floating_point:
        raise DtypeError(f"inputs must be floating point, got {dtype}")
    kernels = implementation(weight.device)
    data = kernels.pack_quantized(weight, dtype, is_gated)
    if data is None:
        say_widened(kernels.name, weight.scheme)
        return pack_weight(dequantize(weight).to(dtype), is_gated=is_gated)
    return PackedWeight(
        data=data,
        out_features=weight.out_features,
        in_features=weight.in_features,
        dtype=dtype,
        is_gated=is_gated,
        scheme=weight.scheme,
    )


@functools.cache
def say_widened(kernels: str, scheme: QuantizationScheme) -> None:
    """Says once that a kernel set holds weights of a scheme unquantized."""
    _LOG.warning("the %s kernels have no form for weights of %s: they are held unquantized", kernels, scheme)


def linear(x: Rows, weight: PackedWeight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Returns x [T, in] times weight [out, in] transposed, plus bias [out].

    Sums are float32 or better. An element's value depends on its row of x alone, never on the other rows, where the
    kernel set promises so (`cpu` does).

    Args:
        dtype: of the result, x's or float32; None: x's.

    Raises:
        ShapeError: the sizes do not fit, or the weight is gated.
        DtypeError: x, weight and bias are not of one floating-point dtype, or the result cannot be of `dtype`.
    """
    if weight.is_gated:
        raise ShapeError("a gated weight is for gated_linear")
    _check(x, weight, bias)
    if dtype not in (None, x.dtype, torch.float32):
        raise DtypeError(f"the result must be of x's dtype {x.dtype} or float32, not {dtype}")
    kernels = implementation(x.device)
    if isinstance(x, QuantizedInputs):
        out = kernels.empty((x.num_rows, weight.out_features), dtype or x.dtype, x.device)
        _of_quantized(kernels).linear(out, x, weight.data, bias)
        return out
    out = kernels.empty((x.shape[0], weight.out_features), dtype or x.dtype, x.device)
    compute = kernels.linear if weight.scheme is None else kernels.quantized_linear
    compute(out, x, weight.data, bias)
    return out


@overload
def gated_linear(
    x: Rows, weight: PackedWeight, activation: GatedActivation, bias: Tensor | None = None, *, inputs_for: None = None
) -> Tensor: ...
@overload
def gated_linear(
    x: Rows,
    weight: PackedWeight,
    activation: GatedActivation,
    bias: Tensor | None = None,
    *,
    inputs_for: PackedWeight | None,
) -> Rows: ...
def gated_linear(
    x: Rows,
    weight: PackedWeight,
    activation: GatedActivation,
    bias: Tensor | None = None,
    *,
    inputs_for: PackedWeight | None = None,
) -> Rows:
    """Returns act(gate) * up as [T, out / 2], where gate and up are the halves of x [T, in] times weight, plus bias.

    Args:
        activation: `silu`, or `gelu_tanh`: gelu's tanh approximation.
        inputs_for: the weight that will read the result, and it alone: it may come as that weight's kernels want it.

    Raises:
        ShapeError: the sizes do not fit, or the weight is not gated.
        DtypeError: x, weight and bias are not of one floating-point dtype.
    """
    if not weight.is_gated:
        raise ShapeError("gated_linear needs a weight packed with is_gated")
    _check(x, weight, bias)
    kernels = implementation(x.device)
    shape = (x.num_rows if isinstance(x, QuantizedInputs) else x.shape[0], weight.out_features // 2)
    rounded = None if weight.scheme is None else new_inputs(kernels, shape, x.dtype, inputs_for)
    if rounded is not None:
        rounded.kernels.gated_linear(rounded.rows, x, weight.data, bias, activation)
        return rounded.rows
    out = kernels.empty(shape, x.dtype, x.device)
    if isinstance(x, QuantizedInputs):
        _of_quantized(kernels).gated_linear(out, x, weight.data, bias, activation)
        return out
    compute = kernels.gated_linear if weight.scheme is None else kernels.quantized_gated_linear
    compute(out, x, weight.data, bias, activation)
    return out


def _of_quantized(kernels: KernelSet) -> QuantizedInputKernels:
    assert kernels.quantized_inputs is not None, "8-bit rows are made by nobody else"
    return kernels.quantized_inputs


def _check(x: Rows, weight: PackedWeight, bias: Tensor | None) -> None:
    if isinstance(x, QuantizedInputs):
        if x.packed is not weight.data:
            raise ShapeError("x was rounded for another weight")
    elif x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ShapeError(f"x must be [T, {weight.in_features}], got {list(x.shape)}")
    elif not x.is_floating_point() or weight.dtype != x.dtype:
        raise DtypeError(f"x and weight must have one floating-point dtype, got {x.dtype} and {weight.dtype}")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.out_features:
            raise ShapeError(f"bias must be [{weight.out_features}], got {list(bias.shape)}")
        if bias.dtype != x.dtype:
            raise DtypeError(f"x and bias must have one dtype, got {x.dtype} and {bias.dtype}")
        if not bias.is_contiguous():
            raise ShapeError(f"bias must be contiguous, its elements are {bias.stride(0)} apart")
