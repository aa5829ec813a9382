# SPDX-License-Identifier: Apache-2.0
"""What a KV cache is to the compiled kernels: addresses, and the number of its kind."""

from __future__ import annotations

import torch

from wavetrain_kernels.kv_cache import KVCache

# `Codes` of source/kv_cache.h, by a quantized cache's dtype; 0 is none.
_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}
# kMostQuantized of source/kv_cache.h.
MOST_QUANTIZED = 1024


def cache_arguments(cache: KVCache) -> tuple[int, int, int | None, int | None, int]:
    """Returns the addresses of keys, values and their scales, and what kind of codes they are."""
    return (
        cache.key.data_ptr(),
        cache.value.data_ptr(),
        None if cache.key_scale is None else cache.key_scale.data_ptr(),
        None if cache.value_scale is None else cache.value_scale.data_ptr(),
        _CODES.get(cache.key.dtype, 0),
    )
