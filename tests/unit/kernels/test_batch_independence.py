# SPDX-License-Identifier: Apache-2.0
"""To the bit: what a compiled kernel makes of a row is the same alone, beside others, cut up, and on any threads.

Linear layers and norms are looked at beside their other tests.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from wavetrain_kernels import ops
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.reference.kv_cache import quantize_heads


@pytest.fixture(autouse=True)
def compiled(kernels: KernelSet) -> None:
    if kernels.name == "reference":
        pytest.skip("PyTorch's results depend on the batch")


class Contexts:
    """Requests of some lengths whose keys, values and queries at every position are known."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        codes: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(head_dim)
        counts = [-(-length // block_size) for length in lengths]
        free = list(range(sum(counts)))
        random.Random(0).shuffle(free)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        shape = (sum(counts), kv_heads, block_size, head_dim)
        caches = [torch.randn(*shape, generator=generator).bfloat16() for _ in range(2)]
        # Some keys stand out, so that sums are rescaled on the way.
        caches[0][::5, :, 3] *= 4
        self.cache = ops.KVCache(*caches)
        if codes is not None:
            (key, key_scale), (value, value_scale) = (quantize_heads(heads, codes) for heads in caches)
            self.cache = ops.KVCache(key, value, key_scale, value_scale)
        self.queries = [torch.randn(length, heads, head_dim, generator=generator).bfloat16() for length in lengths]

    def attend(self, spans: list[tuple[int, int, int]], **options: Any) -> list[Tensor]:
        """One step of (request, first position, end): the attention of those positions, by span."""
        lens = [end - begin for _, begin, end in spans]
        tables = self.tables[[row for row, _, _ in spans]]
        metadata = ops.AttentionMetadata.build(
            lens, [end for _, _, end in spans], tables, torch.full((sum(lens),), -1, dtype=torch.int64)
        )
        query = torch.cat([self.queries[row][begin:end] for row, begin, end in spans])
        scale = self.cache.head_dim**-0.5
        return list(ops.paged_attention(query, self.cache, metadata, scale=scale, **options).split(lens))


@pytest.mark.parametrize(
    ("window", "soft_cap", "codes"),
    [
        (None, None, None),
        (200, None, None),
        (None, 5.0, None),
        (None, None, torch.int8),
        (200, 5.0, torch.float8_e4m3fn),
    ],
    ids=["whole", "window", "soft cap", "int8", "fp8, window, soft cap"],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(6, 2, 64, 16), (4, 4, 128, 16), (20, 1, 32, 32), (3, 3, 18, 4)]
)
def test_attention_of_a_position(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    soft_cap: float | None,
    codes: torch.dtype | None,
) -> None:
    """Of the last positions of contexts within and beyond the 1,024 keys that are summed together."""
    lengths = [1, 130, 700, 2100]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    contexts = Contexts(lengths, **sizes, codes=codes)
    options = {"sliding_window": window, "soft_cap": soft_cap}
    firsts = [max(0, length - 150) for length in lengths]
    torch.set_num_threads(1)
    expected = [
        contexts.attend([(row, *span)], **options)[0] for row, span in enumerate(zip(firsts, lengths, strict=True))
    ]
    last = [(row, length - 1, length) for row, length in enumerate(lengths)]
    rng = random.Random(head_dim)
    cuts = [sorted({*span, *(rng.randrange(*span) for _ in range(3))}) for span in zip(firsts, lengths, strict=True)]
    chunks = [(row, *pair) for row, cut in enumerate(cuts) for pair in pairwise(cut)]
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        for spans in (*([span] for span in last + chunks), last, last * 9, [chunks[-1], *last], chunks):
            for (row, begin, end), result in zip(spans, contexts.attend(spans, **options), strict=True):
                assert torch.equal(result, expected[row][begin - firsts[row] : end - firsts[row]])


def test_rows_of_logits() -> None:
    """Enough of them that threads share rows."""
    num_rows, vocab_size = 5, 40_001
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    seeds, positions, given = torch.arange(3 * num_rows).view(3, num_rows).clone().unbind()
    temperature = torch.tensor([1.0, 0.8, 0.0, 1.7, 0.3])
    top_k, top_p, min_p = torch.tensor([0, 50, 0, 0, 9]), torch.full((num_rows,), 0.9), torch.full((num_rows,), 0.01)

    def results(rows: slice) -> list[Tensor]:
        filters = {"top_k": top_k[rows], "top_p": top_p[rows], "min_p": min_p[rows]}
        lowest = ops.filter_thresholds(logits[rows], temperature[rows], **filters)
        return [
            lowest,
            *ops.sample(logits[rows], seeds[rows], positions[rows], temperature[rows], lowest),
            *ops.sample(logits[rows], seeds[rows], positions[rows], temperature[rows]),
            *ops.sample_greedy(logits[rows]),
            *ops.top_logprobs(logits[rows], given[rows], 7),
        ]

    torch.set_num_threads(1)
    together = results(slice(num_rows))
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for rows in (slice(1), slice(4, 5), slice(1, 4), slice(num_rows)):
            for result, expected in zip(results(rows), together, strict=True):
                assert torch.equal(result, expected[rows])
