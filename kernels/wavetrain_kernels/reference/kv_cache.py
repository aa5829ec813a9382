# SPDX-License-Identifier: Apache-2.0
"""Storing keys and values in the paged KV cache, and what 8 bits make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.kv_cache import LARGEST_CODES, SCALE_DTYPE, SMALLEST_SCALE, KVCache


def write_kv_cache(key: Tensor, value: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Writes key and value [T, Hkv, D] to their slots; a token with slot -1 is skipped."""
    is_kept = slot_mapping >= 0
    if not is_kept.all():
        key, value, slot_mapping = key[is_kept], value[is_kept], slot_mapping[is_kept]
    block_size = cache.block_size
    # Row (block, head, offset) of the cache seen as [num_blocks * Hkv * block_size, D].
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    first = slot_mapping + blocks * ((cache.num_kv_heads - 1) * block_size)
    rows = first.unsqueeze(1) + torch.arange(cache.num_kv_heads, device=key.device) * block_size
    for heads, held, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
        if scale is not None:
            heads, scales = quantize_heads(heads, held.dtype)
            scale.view(-1)[rows] = scales
        as_bytes(held).view(-1, cache.head_dim)[rows] = as_bytes(heads)


def quantize_heads(heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns codes [..., D] of `dtype` and scales [...] of heads [..., D]; codes times scale is about what they were.

    The scale is the largest magnitude divided by the largest code, rounded up to bfloat16; NaN where an element is not
    finite, whose codes then mean nothing.
    """
    wide = heads.float()
    scale = (wide.abs().amax(-1) * (1 / LARGEST_CODES[dtype])).clamp_min(SMALLEST_SCALE)
    # A positive float32, rounded up to one whose lower half is zero.
    scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    codes = wide * scale.reciprocal().unsqueeze(-1)
    if dtype is torch.int8:
        codes = codes.nan_to_num(0.0, 0.0, 0.0).round()
    is_finite = wide.isfinite().all(-1)
    return codes.to(dtype), torch.where(is_finite, scale, torch.nan).to(SCALE_DTYPE)


def dequantize_heads(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns codes [..., D] times their scales [...], in `dtype`."""
    return (codes.float() * scale.float().unsqueeze(-1)).to(dtype)


def as_bytes(x: Tensor) -> Tensor:
    """The same memory as a dtype that PyTorch can index: of float8, the bits."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x
