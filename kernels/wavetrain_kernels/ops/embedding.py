# SPDX-License-Identifier: Apache-2.0
"""Looking up rows of an embedding table."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation
from wavetrain_kernels.packed_weight import PackedWeight

# T = tokens in the step, V = vocabulary size, H = hidden size.


def embedding(token_ids: Tensor, table: Tensor | PackedWeight, *, scale: float = 1.0) -> Tensor:
    """Returns [T, H], rows of the table [V, H] times the scale, rounded to the table's dtype.

    Args:
        token_ids: [T] int64, each below V (not checked: that would read the tensor).
        table: plain and contiguous, or packed where it is also what `linear` multiplies by.

    Raises:
        ShapeError: token_ids is not [T], or the table not [V, H] and contiguous, or it is gated.
        DtypeError: token_ids is not int64, or the table not floating point.
    """
    if token_ids.dim() != 1:
        raise ShapeError(f"token_ids must be [T], got {list(token_ids.shape)}")
    if token_ids.dtype != torch.int64:
        raise DtypeError(f"token_ids must be int64, got {token_ids.dtype}")
    kernels = implementation(token_ids.device)
    if isinstance(table, PackedWeight):
        if table.is_gated:
            raise ShapeError("a gated weight is not a table")
        data, hidden_size = table.data, table.in_features
    else:
        if table.dim() != 2 or not table.is_contiguous():
            raise ShapeError(f"table must be [V, H] and contiguous, got {list(table.shape)}")
        if not table.is_floating_point():
            raise DtypeError(f"table must be floating point, got {table.dtype}")
        data, hidden_size = table, table.shape[1]
    out = kernels.empty((token_ids.shape[0], hidden_size), table.dtype, token_ids.device)
    kernels.embedding(out, data, token_ids, scale, isinstance(table, PackedWeight))
    return out
