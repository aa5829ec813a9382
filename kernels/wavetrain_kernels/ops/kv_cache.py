# SPDX-License-Identifier: Apache-2.0
"""The two tensors of a layer's paged KV cache: where they come from, what they must look like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation


def allocate_kv_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the keys, or the values, of a layer: zeros [num_blocks, Hkv, block_size, D].

    On a CPU they take memory only as they are written to.
    """
    return implementation(device).zeros(shape, dtype, device)


def check_caches(key_cache: Tensor, value_cache: Tensor, like: Tensor) -> None:
    """Checks that the caches fit each other and the head dimension and dtype of `like` [T, heads, D].

    Raises:
        ShapeError, DtypeError: they do not.
    """
    if key_cache.dim() != 4 or value_cache.shape != key_cache.shape:
        raise ShapeError(
            "key_cache and value_cache must be [num_blocks, Hkv, block_size, D], "
            f"got {list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    if key_cache.shape[3] != like.shape[2]:
        raise ShapeError(f"the cache holds heads of {key_cache.shape[3]} dimensions, got {like.shape[2]}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ShapeError("key_cache and value_cache must be contiguous")
    if key_cache.dtype != like.dtype or value_cache.dtype != like.dtype:
        raise DtypeError(f"the caches hold {key_cache.dtype} and {value_cache.dtype}, got {like.dtype}")
