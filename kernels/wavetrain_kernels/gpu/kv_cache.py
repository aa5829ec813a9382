# SPDX-License-Identifier: Apache-2.0
"""8-bit codes of the KV cache, in kernels: read as numbers, and made of heads. See `wavetrain_kernels.kv_cache`.

Chips before compute capability 8.9 know nothing of e4m3, and Triton has no such type for them: there kernels are given
the bits, and convert them by integer arithmetic. What writes the cache does so everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.launch import device_traits
from wavetrain_kernels.kv_cache import LARGEST_CODES, SMALLEST_SCALE, KVCache

_FIRST_WITH_E4M3 = (8, 9)

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# The least normal number of e4m3, and what makes of one below it, in float32, a multiple of 2^-9 in the last bits.
_LEAST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMAL_SHIFT = tl.constexpr(2.0**14)
_SUBNORMAL_SHIFT_BITS = tl.constexpr((127 + 14) << 23)

# What a quantized cache is to a compiled kernel that reads it, in Triton's spelling; `u8` is e4m3 on chips without it.
QUANTIZED_TYPES = ("i8", "fp8e4nv", "u8")


def cache_signature(dtype: str, codes: str | None) -> tuple[dict[str, str], dict[str, object]]:
    """Returns types of a reading kernel's pointers to a cache, and those that are None; codes None: of `dtype`."""
    signature = {"key_ptr": f"*{codes or dtype}", "value_ptr": f"*{codes or dtype}"}
    if codes is None:
        return signature, {"key_scale_ptr": None, "value_scale_ptr": None}
    return signature | {"key_scale_ptr": "*bf16", "value_scale_ptr": "*bf16"}, {}


def archs_of(codes: str | None) -> tuple[str, ...] | None:
    """Returns the architectures that launchers give such codes to; None: all."""
    return {"fp8e4nv": ("sm_90", "sm_100"), "u8": ("sm_80",)}.get(codes or "")


def codes_to_read(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Returns keys and values as kernels that read them take them: e4m3 as its bits where the chip has no such type."""
    has_type = device_traits(cache.key.device).capability >= _FIRST_WITH_E4M3
    return (cache.key, cache.value) if has_type else codes_to_write(cache)


def codes_to_write(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Returns keys and values as kernels that write them take them: e4m3 as its bits."""
    if cache.key.dtype is not torch.float8_e4m3fn:
        return cache.key, cache.value
    return cache.key.view(torch.uint8), cache.value.view(torch.uint8)


def largest_code(cache: KVCache) -> float | None:
    """Returns the largest magnitude of a code; None: the cache is not quantized."""
    return LARGEST_CODES.get(cache.key.dtype)


@triton.jit
def widen_codes(codes, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes, or elements of a cache that has none, in a wider type; exact."""
    if codes.dtype == tl.uint8:
        # With its bits in their place an e4m3 number, subnormal or not, is a float16 that lacks a factor of 2^(15 - 7).
        bits = ((codes.to(tl.uint16) & 0x80) << 8) | ((codes.to(tl.uint16) & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)
    return codes.to(DTYPE)


@triton.jit
def load_scales(key_scale_ptr, value_scale_ptr, offsets, is_wanted) -> tuple[tl.tensor | float, tl.tensor | float]:
    """Scales of keys and of values in float32; 0 where not wanted, since what lies there may be NaN.

    The pointers are None where there are none: then what is returned is none for the functions below.
    """
    if key_scale_ptr is None:
        key_scale, value_scale = 0.0, 0.0
    else:
        key_scale = tl.load(key_scale_ptr + offsets, mask=is_wanted, other=0.0).to(tl.float32)
        value_scale = tl.load(value_scale_ptr + offsets, mask=is_wanted, other=0.0).to(tl.float32)
    return key_scale, value_scale


@triton.jit
def scale_scores(scores, key_scale, key_scale_ptr) -> tl.tensor:
    """Scores [BLOCK_M, BLOCK_N] of codes as those of keys."""
    return scores if key_scale_ptr is None else scores * key_scale[None, :]


@triton.jit
def scale_weights(weights, value_scale, value_scale_ptr, DTYPE: tl.constexpr) -> tl.tensor:
    """Weights [BLOCK_M, BLOCK_N] times the scales of the codes that they are multiplied with.

    float16 has no room for the product of a small weight and a small scale: there `scale_values` does it.
    """
    return weights if value_scale_ptr is None or tl.float16 == DTYPE else weights * value_scale[None, :]


@triton.jit
def scale_values(value, value_scale, value_scale_ptr) -> tl.tensor:
    """Values [BLOCK_N, BLOCK_D] of codes, in float16; in other types they stay codes."""
    if value_scale_ptr is not None and value.dtype == tl.float16:
        value = (value.to(tl.float32) * value_scale[:, None]).to(tl.float16)
    return value


@triton.jit
def head_scale(largest, poison, LARGEST_CODE: tl.constexpr) -> tl.tensor:
    """The scales of heads with these largest magnitudes, in float32 but exact in bfloat16; NaN where `poison` is."""
    scale = tl.maximum(largest * (1.0 / LARGEST_CODE), _SMALLEST_SCALE)
    # A positive float32, rounded up to one whose lower half is zero.
    bits = (scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return bits.to(tl.float32, bitcast=True) + poison


@triton.jit
def codes_of(x, scale, LARGEST_CODE: tl.constexpr) -> tl.tensor:
    """x / scale as int8, or as the bits of e4m3: to nearest, ties to even. LARGEST_CODE says which."""
    wide = x.to(tl.float32) * (1.0 / scale)
    if LARGEST_CODE < 128:
        # In the last bits of 1.5 * 2^23 + x stands x, rounded.
        codes = ((wide + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        magnitude = tl.abs(wide)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        subnormal = (magnitude + _SUBNORMAL_SHIFT).to(tl.int32, bitcast=True) - _SUBNORMAL_SHIFT_BITS
        sign = (wide.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = (tl.where(magnitude < _LEAST_NORMAL, subnormal, normal) | sign).to(tl.uint8)
    return codes
