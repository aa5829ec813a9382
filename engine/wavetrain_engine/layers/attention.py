# SPDX-License-Identifier: Apache-2.0
"""Causal attention over the paged KV cache, and what one layer's part of that cache is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wavetrain_kernels import ops
from wavetrain_kernels.ops import AttentionMetadata, KVCache

__all__ = ["KVCache", "KVCacheSpec", "PagedAttention"]

# T = tokens of the step.


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """What a model's KV cache is made of; every layer's part has the same shape.

    Attributes:
        dtype: the model's, or torch.int8 or torch.float8_e4m3fn, which have scales beside them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block of `block_size` tokens takes in all layers together: keys, values and their scales."""
        per_token = ops.kv_cache_bytes_per_token(self.num_kv_heads, self.head_dim, self.dtype)
        return self.num_layers * block_size * per_token

    @property
    def dtype_name(self) -> str:
        """The dtype as people write it: bfloat16, int8, fp8_e4m3."""
        return "fp8_e4m3" if self.dtype is torch.float8_e4m3fn else str(self.dtype).removeprefix("torch.")

    def shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """Shape of a layer's keys, and of its values."""
        return (num_blocks, self.num_kv_heads, block_size, self.head_dim)


class PagedAttention(nn.Module):
    """Lets every query of the step see its request's context."""

    def __init__(self, *, scale: float, sliding_window: int | None = None, soft_cap: float | None = None) -> None:
        super().__init__()
        self._scale = scale
        self._sliding_window = sliding_window
        self._soft_cap = soft_cap

    def forward(self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        """Takes query [T, Hq, D]; returns the heads' outputs side by side [T, Hq * D].

        The cache must hold the step's own keys and values already.
        """
        output = ops.paged_attention(
            query,
            kv_cache,
            metadata,
            scale=self._scale,
            sliding_window=self._sliding_window,
            soft_cap=self._soft_cap,
        )
        return output.flatten(1)
