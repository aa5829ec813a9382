# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021), the half-split form of Hugging Face, on the way into the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.ops.dispatch import implementation
from wavetrain_kernels.ops.kv_cache import check_cache

# T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension, R = rotated dimensions.


def rotate_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: KVCache,
    slot_mapping: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns the rotated query [T, Hq, D], contiguous; writes the rotated key, and the value, to the cache in place.

    With norms each head of query and key is scaled to unit root-mean-square first, then by the norm's weight, rounded
    as `rms_norm` does it. Of what comes out, the first R dimensions of query and key [T, Hkv, D] are rotated by the
    positions [T]: dimension i is paired with i + R/2. The others are passed through. Computes in the wider dtype of
    the input and cos_sin_cache, and rounds to the input's. Inputs may be any views.

    A quantized cache gets each head of key and value as codes times a scale (`KVCache`), rounded to nearest.

    Args:
        positions: int64 or int32, each less than max_position (not checked: that would read the tensor).
        cos_sin_cache: [max_position, 2, R/2]; cosines at [:, 0], sines at [:, 1].
        slot_mapping: [T] int64; token t goes to block slot // block_size, offset slot % block_size; a token with slot
            -1 is not written. No slot may occur twice.
        query_norm, key_norm: [D], shared by all heads; both or neither.
        eps: of the norms.

    Raises:
        ShapeError: a tensor has another shape than above, the cache is not contiguous, or there is one norm alone.
        DtypeError: query, key, value and norms are not of one floating-point dtype, the cache neither of theirs nor
            quantized, positions are not integers or slot_mapping is not int64.
    """
    _check_heads(query, key, value)
    _check_norms(query, query_norm, key_norm)
    _check_positions(query, positions, cos_sin_cache)
    check_cache(cache, key)
    if key.shape[1] != cache.num_kv_heads:
        raise ShapeError(f"key has {key.shape[1]} heads, the cache {cache.num_kv_heads}")
    if slot_mapping.shape != positions.shape:
        raise ShapeError(f"slot_mapping must be [T] = [{query.shape[0]}], got {list(slot_mapping.shape)}")
    if slot_mapping.dtype != torch.int64:
        raise DtypeError(f"slot_mapping must be int64, got {slot_mapping.dtype}")
    kernels = implementation(query.device)
    query_out = kernels.empty(query.shape, query.dtype, query.device)
    inputs = (query, key, value, positions, cos_sin_cache)
    kernels.rotate_and_cache(query_out, *inputs, cache, slot_mapping, query_norm, key_norm, eps)
    return query_out


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3 or key.dim() != 3 or query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ShapeError(f"query must be [T, Hq, D] and key [T, Hkv, D], got {list(query.shape)}, {list(key.shape)}")
    if value.shape != key.shape:
        raise ShapeError(f"key and value must be [T, Hkv, D], got {list(key.shape)} and {list(value.shape)}")
    if not query.is_floating_point() or key.dtype != query.dtype or value.dtype != query.dtype:
        raise DtypeError(
            f"query, key and value must have one floating-point dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )


def _check_norms(query: Tensor, query_norm: Tensor | None, key_norm: Tensor | None) -> None:
    if query_norm is None and key_norm is None:
        return
    if query_norm is None or key_norm is None:
        raise ShapeError("query_norm and key_norm go together, got one of them")
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm.shape != query.shape[2:]:
            raise ShapeError(f"{name} must be [D] = [{query.shape[2]}], got {list(norm.shape)}")
        if norm.dtype != query.dtype:
            raise DtypeError(f"query and {name} must have one dtype, got {query.dtype} and {norm.dtype}")


def _check_positions(query: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> None:
    if positions.dim() != 1 or positions.shape[0] != query.shape[0]:
        raise ShapeError(f"positions must be [T] = [{query.shape[0]}], got {list(positions.shape)}")
    shape = cos_sin_cache.shape
    if len(shape) != 3 or shape[1] != 2 or 2 * shape[2] > query.shape[2]:
        raise ShapeError(f"cos_sin_cache must be [max_position, 2, R/2] with R <= {query.shape[2]}, got {list(shape)}")
    if positions.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"positions must be int64 or int32, got {positions.dtype}")
    if not cos_sin_cache.is_floating_point():
        raise DtypeError(f"cos_sin_cache must be floating point, got {cos_sin_cache.dtype}")
