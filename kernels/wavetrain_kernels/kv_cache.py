# SPDX-License-Identifier: Apache-2.0
"""One layer's paged KV cache: keys and values as the model has them, or in 8 bits with a scale for each token and head.

A scale is found when a token is written, from the largest magnitude of its head: a token's contents depend on itself
alone, whoever shares its block, and nothing has to be calibrated. Scales are bfloat16, rounded up, and it is the
rounded one that is divided by: a scale of 2 bytes costs no precision but that of 1/256 of the range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The largest magnitude that a quantized cache holds, by its dtype.
LARGEST_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SCALE_DTYPE = torch.bfloat16
# Below this a scale would be no use: heads of nothing else are zeros, and no reciprocal overflows.
SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """Keys and values of one layer, written in place. A token's slot is block * block_size + offset.

    Attributes:
        key, value: [num_blocks, num_kv_heads, block_size, head_dim], of the model's dtype, int8 or float8_e4m3fn.
        key_scale, value_scale: [num_blocks, num_kv_heads, block_size] bfloat16; None unless the cache is quantized.
            What a head was is its codes times its scale; a scale of NaN says that it was not finite.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether there are scales."""
        return self.key_scale is not None

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads."""
        return self.key.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.key.shape[3]


def is_quantized_dtype(dtype: torch.dtype) -> bool:
    """Whether a cache of this dtype has scales."""
    return dtype in LARGEST_CODES


def kv_cache_bytes_per_token(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Returns what a token takes in one layer, keys, values and scales."""
    scale_bytes = SCALE_DTYPE.itemsize if is_quantized_dtype(dtype) else 0
    return 2 * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)
