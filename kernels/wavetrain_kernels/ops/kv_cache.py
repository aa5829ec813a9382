# SPDX-License-Identifier: Apache-2.0
"""A layer's paged KV cache: where it comes from, what it must look like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kv_cache import SCALE_DTYPE, KVCache, is_quantized_dtype
from wavetrain_kernels.ops.dispatch import implementation


def allocate_kv_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> KVCache:
    """Returns a layer's cache of zeros [num_blocks, Hkv, block_size, D]; with scales where the dtype has 8 bits.

    On a CPU they take memory only as they are written to.

    Args:
        dtype: the model's, torch.int8 or torch.float8_e4m3fn.
    """
    zeros = implementation(device).zeros
    key, value = zeros(shape, dtype, device), zeros(shape, dtype, device)
    if not is_quantized_dtype(dtype):
        return KVCache(key, value)
    return KVCache(key, value, zeros(shape[:3], SCALE_DTYPE, device), zeros(shape[:3], SCALE_DTYPE, device))


def check_cache(cache: KVCache, like: Tensor) -> None:
    """Checks that a cache is sound, and fits the head dimension and dtype of `like` [T, heads, D].

    Raises:
        ShapeError, DtypeError: it does not.
    """
    key, value = cache.key, cache.value
    if key.dim() != 4 or value.shape != key.shape:
        raise ShapeError(
            "keys and values of a cache must be [num_blocks, Hkv, block_size, D], "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if key.shape[3] != like.shape[2]:
        raise ShapeError(f"the cache holds heads of {key.shape[3]} dimensions, got {like.shape[2]}")
    if not (key.is_contiguous() and value.is_contiguous()):
        raise ShapeError("keys and values of a cache must be contiguous")
    dtype = key.dtype if is_quantized_dtype(key.dtype) else like.dtype
    if key.dtype != dtype or value.dtype != dtype:
        raise DtypeError(f"the cache holds {key.dtype} and {value.dtype}, got {like.dtype}")
    _check_scales(cache)


def _check_scales(cache: KVCache) -> None:
    is_quantized = is_quantized_dtype(cache.key.dtype)
    for name, scale in (("key_scale", cache.key_scale), ("value_scale", cache.value_scale)):
        if (scale is not None) != is_quantized:
            raise ShapeError(f"a cache of {cache.key.dtype} has {'a' if is_quantized else 'no'} {name}")
        if scale is None:
            continue
        if scale.shape != cache.key.shape[:3] or not scale.is_contiguous():
            raise ShapeError(
                f"{name} must be contiguous [num_blocks, Hkv, block_size] = {list(cache.key.shape[:3])}, "
                f"got {list(scale.shape)}"
            )
        if scale.dtype != SCALE_DTYPE:
            raise DtypeError(f"{name} must be {SCALE_DTYPE}, got {scale.dtype}")
