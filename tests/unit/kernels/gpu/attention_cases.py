# SPDX-License-Identifier: Apache-2.0
"""Steps to attend over, with everything that may go wrong in them: scattered blocks, NaN in stale slots, odd lengths.

The oracle is the reference in float32, on the numbers that the kernel under test is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.kv_cache import LARGEST_CODES, KVCache
from wavetrain_kernels.reference.kernels import REFERENCE
from wavetrain_kernels.reference.kv_cache import dequantize_heads, quantize_heads

# T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension.

# paged_attention of a kernel set.
Attention = Callable[[Tensor, Tensor, KVCache, AttentionMetadata, float, int | None, float | None], None]

# What an element of `out` that nobody writes keeps.
UNWRITTEN = 77.0

# Dtypes of a quantized cache, and whether the chip has the type: one that has not is given the bits.
CODES = [
    pytest.param(torch.int8, True, id="int8"),
    pytest.param(torch.float8_e4m3fn, True, id="fp8"),
    pytest.param(torch.float8_e4m3fn, False, id="fp8 as bits"),
]

# How far from the oracle a result may be, by what it is computed from. The oracle is exact beside these.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The sizes of a layer's attention."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16


@dataclass(eq=False)
class AttentionCase:
    """One step on the device under test. `query` is a slice of a wider tensor, as of a fused projection."""

    query: Tensor
    cache: KVCache
    metadata: AttentionMetadata
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None

    def attend(self, paged_attention: Attention) -> Tensor:
        """Returns [T, Hq, D]: what a `paged_attention` of a kernel set writes; UNWRITTEN where it writes nothing."""
        out = torch.full(self.query.shape, UNWRITTEN, dtype=self.query.dtype, device=self.query.device)
        paged_attention(
            out,
            self.query,
            self.cache,
            self.metadata,
            self.scale,
            self.sliding_window,
            self.soft_cap,
        )
        return out

    def expected(self) -> Tensor:
        """Returns [T, Hq, D] float32 on the CPU: the reference's answer, UNWRITTEN where no row has the token."""
        query = self.query.float().cpu()
        metadata = self.metadata
        on_host = AttentionMetadata(
            metadata.query_start_loc.cpu(),
            metadata.seq_lens.cpu(),
            metadata.block_tables.cpu(),
            metadata.slot_mapping.cpu(),
            metadata.max_query_len,
            metadata.max_seq_len,
        )
        out = torch.full(query.shape, UNWRITTEN)
        REFERENCE.paged_attention(
            out, query, self._exact_cache(), on_host, self.scale, self.sliding_window, self.soft_cap
        )
        return out

    def _exact_cache(self) -> KVCache:
        """The cache in float32 on the CPU; a quantized one as what its codes stand for."""
        heads = [(self.cache.key, self.cache.key_scale), (self.cache.value, self.cache.value_scale)]
        return KVCache(
            *(
                x.float().cpu() if scale is None else dequantize_heads(x.cpu(), scale.cpu(), torch.float32)
                for x, scale in heads
            )
        )


def make_case(
    rows: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    heads: Heads | None = None,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    seed: int = 0,
    codes: torch.dtype | None = None,
) -> AttentionCase:
    """Builds a step of rows (number of queries, length of the context with them) with random contents.

    Rows of (0, 0) are the padding of a captured graph. All slots that belong to no context hold NaN, the blocks of a
    context are scattered, and the tables of short rows are filled up with a block of NaN, as are those of blocks that
    lie before the window: their owner may have given them back. Some keys stand out, so that sums are rescaled.

    Args:
        codes: of a quantized cache, with scales of NaN where nobody wrote.
    """
    heads = heads or Heads()
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-seq_len // heads.block_size) for _, seq_len in rows]
    num_blocks = sum(counts) + 2
    free = list(range(1, num_blocks))
    random.Random(seed).shuffle(free)
    width = max(counts, default=0) + 1
    tables = torch.zeros(len(rows), width, dtype=torch.int32)
    shape = (num_blocks, heads.num_kv_heads, heads.block_size, heads.head_dim)
    caches = torch.full((2, *shape), float("nan"))
    slots: list[int] = []
    for row, (query_len, seq_len) in enumerate(rows):
        blocks = [free.pop() for _ in range(counts[row])]
        first_key = 0 if sliding_window is None else max(0, seq_len - query_len - sliding_window + 1)
        num_gone = first_key // heads.block_size
        tables[row, num_gone : len(blocks)] = torch.tensor(blocks[num_gone:], dtype=torch.int32)
        row_slots = [blocks[p // heads.block_size] * heads.block_size + p % heads.block_size for p in range(seq_len)]
        contents = torch.randn(2, seq_len, heads.num_kv_heads, heads.head_dim, generator=generator)
        contents[0, ::7] *= 2
        at = torch.tensor(row_slots, dtype=torch.int64)
        caches[:, at // heads.block_size, :, at % heads.block_size] = contents.transpose(0, 1)
        slots += row_slots[seq_len - query_len :]
    num_tokens = sum(query_len for query_len, _ in rows)
    fused = torch.randn(num_tokens, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim, generator=generator)
    metadata = AttentionMetadata.build(
        [query_len for query_len, _ in rows],
        [seq_len for _, seq_len in rows],
        tables.to(device),
        torch.tensor(slots, dtype=torch.int64, device=device),
    )
    return AttentionCase(
        query=fused.to(dtype).to(device)[:, : heads.num_heads],
        cache=_cache(caches, dtype if codes is None else codes, device),
        metadata=metadata,
        scale=heads.head_dim**-0.5,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def _cache(contents: Tensor, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Keys and values [2, num_blocks, Hkv, block_size, D] as a cache of `dtype`."""
    if dtype not in LARGEST_CODES:
        return KVCache(*contents.to(dtype).to(device))
    (key, key_scale), (value, value_scale) = (quantize_heads(heads, dtype) for heads in contents)
    return KVCache(*(x.to(device) for x in (key, value, key_scale, value_scale)))


def assert_attends(case: AttentionCase, paged_attention: Attention) -> None:
    """Asserts that a `paged_attention` answers as the reference does, to the type's precision."""
    result, expected = case.attend(paged_attention), case.expected()
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(result.float().cpu(), expected, atol=tolerance, rtol=tolerance)
