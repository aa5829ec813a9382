# SPDX-License-Identifier: Apache-2.0
"""Storing keys and values in the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation

# T = tokens in the step, Hkv = key-value heads, D = head dimension.


def write_kv_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes key and value [T, Hkv, D] into the caches [num_blocks, Hkv, block_size, D], in place.

    Token t goes to block slot_mapping[t] // block_size, offset slot_mapping[t] % block_size; a token with slot -1 is
    not written. No slot may occur twice.

    Raises:
        ShapeError: a tensor has another shape than above, or a cache is not contiguous.
        DtypeError: key, value and caches are not of one dtype, or slot_mapping is not int64.
    """
    if key.dim() != 3 or value.shape != key.shape:
        raise ShapeError(f"key and value must be [T, Hkv, D], got {list(key.shape)} and {list(value.shape)}")
    check_caches(key_cache, value_cache, key)
    if key.shape[1] != key_cache.shape[1]:
        raise ShapeError(f"key has {key.shape[1]} heads, the cache {key_cache.shape[1]}")
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != key.shape[0]:
        raise ShapeError(f"slot_mapping must be [T] = [{key.shape[0]}], got {list(slot_mapping.shape)}")
    if value.dtype != key.dtype:
        raise DtypeError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
    if slot_mapping.dtype != torch.int64:
        raise DtypeError(f"slot_mapping must be int64, got {slot_mapping.dtype}")
    implementation(key.device).write_kv_cache(key, value, key_cache, value_cache, slot_mapping)


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
