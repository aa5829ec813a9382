# SPDX-License-Identifier: Apache-2.0
"""Taking some rows out of many."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation

# T = rows there are, N = rows taken.


def select_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Returns [N, ...]: the rows of x [T, ...] at the indices.

    In a recorded `Program` every op from the first selection on is over the tokens that a step wants.

    Args:
        indices: [N] int64, each below T (not checked: that would read the tensor).

    Raises:
        ShapeError: x has no rows or is not contiguous, or the indices are not [N].
        DtypeError: x is not floating point, or the indices are not int64.
    """
    if x.dim() < 2 or not x.is_contiguous():
        raise ShapeError(f"x must be [T, ...] and contiguous, got {list(x.shape)}")
    if not x.is_floating_point():
        raise DtypeError(f"x must be floating point, got {x.dtype}")
    if indices.dim() != 1:
        raise ShapeError(f"indices must be [N], got {list(indices.shape)}")
    if indices.dtype != torch.int64:
        raise DtypeError(f"indices must be int64, got {indices.dtype}")
    kernels = implementation(x.device)
    out = kernels.empty((indices.shape[0], *x.shape[1:]), x.dtype, x.device)
    kernels.select_rows(out, x, indices)
    return out
