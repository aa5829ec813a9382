# SPDX-License-Identifier: Apache-2.0
"""The matrix product of every projection."""

from __future__ import annotations

from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x [..., in] times weight [out, in] transposed, plus bias [out].

    Raises:
        ShapeError: the sizes do not fit.
        DtypeError: x, weight and bias are not of one floating-point dtype.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"x must be [..., in] and weight [out, in], got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point() or weight.dtype != x.dtype:
        raise DtypeError(f"x and weight must have one floating-point dtype, got {x.dtype} and {weight.dtype}")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ShapeError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.dtype != x.dtype:
            raise DtypeError(f"x and bias must have one dtype, got {x.dtype} and {bias.dtype}")
    return implementation(x.device).linear(x, weight, bias)
