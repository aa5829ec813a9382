# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, half-split, and what follows it: the keys and values of the step go into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.reference.kv_cache import write_kv_cache
from wavetrain_kernels.reference.norm import rms_norm


def rotate_and_cache(
    query_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: KVCache,
    slot_mapping: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> None:
    """query_out = rotated query; the cache gets the rotated key, and the value. Norms come before the rotation."""
    query, key = _normalized(query, query_norm, eps), _normalized(key, key_norm, eps)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    rotary_embedding(query_out, key_out, query, key, positions, cos_sin_cache)
    write_kv_cache(key_out, value, cache, slot_mapping)


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms_norm(out, x, weight, eps, 0.0)
    return out


def rotary_embedding(
    query_out: Tensor, key_out: Tensor, query: Tensor, key: Tensor, positions: Tensor, cos_sin_cache: Tensor
) -> None:
    """Rotates the first 2 * cos_sin_cache.shape[2] dimensions of every head; the others are copied."""
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(2).unbind(1)  # each [T, 1, R/2]
    _rotate(query_out, query, cos, sin)
    _rotate(key_out, key, cos, sin)


def _rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half : 2 * half])
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
