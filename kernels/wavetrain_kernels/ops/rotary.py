# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021), the half-split form that Hugging Face's Llama uses."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation

# T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension, R = rotated dimensions.


def rotary_embedding(query: Tensor, key: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the first R dimensions of query [T, Hq, D] and key [T, Hkv, D] by their positions [T].

    Dimension i is paired with i + R/2. Dimensions from R on are passed through. Computes in the wider dtype of the
    input and cos_sin_cache, and rounds to the input's. The results are contiguous; inputs may be any views.

    Args:
        positions: int64 or int32, each less than max_position (not checked: that would read the tensor).
        cos_sin_cache: [max_position, 2, R/2]; cosines at [:, 0], sines at [:, 1].

    Raises:
        ShapeError: a tensor has another shape than above.
        DtypeError: query and key are not of one floating-point dtype, or positions are not integers.
    """
    _check(query, key, positions, cos_sin_cache)
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    implementation(query.device).rotary_embedding(query_out, key_out, query, key, positions, cos_sin_cache)
    return query_out, key_out


def _check(query: Tensor, key: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> None:
    if query.dim() != 3 or key.dim() != 3 or query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ShapeError(f"query must be [T, Hq, D] and key [T, Hkv, D], got {list(query.shape)}, {list(key.shape)}")
    if positions.dim() != 1 or positions.shape[0] != query.shape[0]:
        raise ShapeError(f"positions must be [T] = [{query.shape[0]}], got {list(positions.shape)}")
    shape = cos_sin_cache.shape
    if len(shape) != 3 or shape[1] != 2 or 2 * shape[2] > query.shape[2]:
        raise ShapeError(f"cos_sin_cache must be [max_position, 2, R/2] with R <= {query.shape[2]}, got {list(shape)}")
    if not query.is_floating_point() or key.dtype != query.dtype:
        raise DtypeError(f"query and key must have one floating-point dtype, got {query.dtype} and {key.dtype}")
    if positions.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"positions must be int64 or int32, got {positions.dtype}")
    if not cos_sin_cache.is_floating_point():
        raise DtypeError(f"cos_sin_cache must be floating point, got {cos_sin_cache.dtype}")
