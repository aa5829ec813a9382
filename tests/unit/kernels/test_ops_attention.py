# SPDX-License-Identifier: Apache-2.0
"""paged_attention and write_kv_cache against a loop over tokens and heads that shares no code with them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError

BLOCK_SIZE = 4
NUM_BLOCKS = 64


def make_caches(num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Caches full of NaN: whatever is read besides what was written shows."""
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
    return torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)


class Step:
    """A step of requests with fragmented blocks, all their keys and values in the cache."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        num_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(len(rows))
        self.rows = rows
        self.num_groups = num_heads // num_kv_heads
        self.key_cache, self.value_cache = make_caches(num_kv_heads, head_dim, dtype)
        free = list(range(1, NUM_BLOCKS))
        random.Random(0).shuffle(free)
        tables, self.keys, self.values, slots = [], [], [], []
        for query_len, seq_len in rows:
            blocks = [free.pop() for _ in range(-(-seq_len // BLOCK_SIZE))]
            key, value = torch.randn(2, seq_len, num_kv_heads, head_dim, generator=generator).to(dtype)
            row_slots = torch.tensor(
                [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(seq_len)], dtype=torch.int64
            )
            ops.write_kv_cache(key, value, self.key_cache, self.value_cache, row_slots)
            self.keys.append(key)
            self.values.append(value)
            tables.append(blocks)
            slots.append(row_slots[seq_len - query_len :])
        width = max((len(blocks) for blocks in tables), default=0) + 2
        self.metadata = ops.AttentionMetadata.build(
            [query_len for query_len, _ in rows],
            [seq_len for _, seq_len in rows],
            torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in tables], dtype=torch.int32).view(-1, width),
            torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
        )
        self.query = torch.randn(self.metadata.num_tokens, num_heads, head_dim, generator=generator).to(dtype)

    def attend(self, **options) -> torch.Tensor:
        return ops.paged_attention(self.query, self.key_cache, self.value_cache, self.metadata, scale=0.3, **options)

    def expected(self, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
        """The definition of attention, one token and head at a time, in float64."""
        out = torch.zeros_like(self.query, dtype=torch.float64)
        token = 0
        for (query_len, seq_len), key, value in zip(self.rows, self.keys, self.values, strict=True):
            for position in range(seq_len - query_len, seq_len):
                low = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                for head in range(self.query.shape[1]):
                    kv_head = head // self.num_groups
                    seen = key[low : position + 1, kv_head].double()
                    scores = (seen @ self.query[token, head].double()) * 0.3
                    if soft_cap is not None:
                        scores = torch.tanh(scores / soft_cap) * soft_cap
                    out[token, head] = torch.softmax(scores, 0) @ value[low : position + 1, kv_head].double()
                token += 1
        return out


STEPS = {
    "one decode": [(1, 9)],
    "one decode of one token": [(1, 1)],
    "decode at a block's end": [(1, 8)],
    "decodes": [(1, 3), (1, 17), (1, 8), (1, 1)],
    "decodes of unlike length": [(1, 3), (1, 70), (1, 2), (1, 66)],
    "one prompt": [(7, 7)],
    "one chunk": [(5, 14)],
    "mixed": [(1, 12), (6, 6), (1, 5), (3, 21), (1, 33), (2, 2)],
    "a row without queries": [(1, 5), (0, 4), (2, 6)],
}


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 1000])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS.keys())
def test_attention_is_the_definition(rows, sliding_window, soft_cap):
    step = Step(rows)
    result = step.attend(sliding_window=sliding_window, soft_cap=soft_cap)
    torch.testing.assert_close(result.double(), step.expected(sliding_window, soft_cap), atol=1e-5, rtol=1e-5)
