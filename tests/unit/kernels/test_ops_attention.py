# SPDX-License-Identifier: Apache-2.0
"""paged_attention against a loop over tokens and heads that shares no code with it."""

from __future__ import annotations

import math
import random

import pytest
import torch

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.reference.kv_cache import dequantize_heads, quantize_heads, write_kv_cache

pytestmark = pytest.mark.usefixtures("kernels")

BLOCK_SIZE = 4
NUM_BLOCKS = 64
QUANTIZED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def make_cache(num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> ops.KVCache:
    """A cache full of NaN: whatever is read besides what was written shows."""
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
    if dtype not in QUANTIZED:
        return ops.KVCache(torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype))
    key, value = (torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype) for _ in range(2))  # NaN in e4m3
    return ops.KVCache(key, value, *(torch.full(shape[:3], float("nan"), dtype=torch.bfloat16) for _ in range(2)))


class Step:
    """A step of requests with fragmented blocks, all their keys and values in the cache."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        num_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(len(rows))
        self.rows = rows
        self.num_groups = num_heads // num_kv_heads
        self.cache = make_cache(num_kv_heads, head_dim, cache_dtype or dtype)
        free = list(range(1, NUM_BLOCKS))
        random.Random(0).shuffle(free)
        tables, self.keys, self.values, slots = [], [], [], []
        for query_len, seq_len in rows:
            blocks = [free.pop() for _ in range(-(-seq_len // BLOCK_SIZE))]
            key, value = torch.randn(2, seq_len, num_kv_heads, head_dim, generator=generator).to(dtype)
            row_slots = torch.tensor(
                [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(seq_len)], dtype=torch.int64
            )
            write_kv_cache(key, value, self.cache, row_slots)
            if cache_dtype is not None:
                key, value = (dequantize_heads(*quantize_heads(x, cache_dtype), dtype) for x in (key, value))
            self.keys.append(key)
            self.values.append(value)
            tables.append(blocks)
            slots.append(row_slots[seq_len - query_len :])
        width = max((len(blocks) for blocks in tables), default=0) + 2
        self.metadata = ops.AttentionMetadata.build(
            [query_len for query_len, _ in rows],
            [seq_len for _, seq_len in rows],
            torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in tables], dtype=torch.int32).view(
                -1, width
            ),
            torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
        )
        self.query = torch.randn(self.metadata.num_tokens, num_heads, head_dim, generator=generator).to(dtype)

    def attend(self, **options) -> torch.Tensor:
        return ops.paged_attention(self.query, self.cache, self.metadata, scale=0.3, **options)

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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
def test_attention_in_half_precision(dtype, tolerance, soft_cap):
    step = Step(STEPS["mixed"], dtype=dtype)
    result = step.attend(soft_cap=soft_cap)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), step.expected(soft_cap=soft_cap), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cache_dtype", QUANTIZED, ids=QUANTIZED.values())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"soft_cap": 0.7}], ids=["whole", "window", "cap"])
@pytest.mark.parametrize("rows", [STEPS["mixed"], STEPS["decodes of unlike length"]], ids=["mixed", "decodes"])
def test_attention_over_codes(rows, options, dtype, tolerance, cache_dtype):
    """The oracle sees what the codes stand for; scales and codes where nobody wrote are NaN."""
    for head_dim in (8, 32, 80):
        step = Step(rows, dtype=dtype, cache_dtype=cache_dtype, head_dim=head_dim)
        result = step.attend(**options)
        torch.testing.assert_close(result.double(), step.expected(**options), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cache_dtype", QUANTIZED, ids=QUANTIZED.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_was_not_finite_stays_alone(dtype, cache_dtype):
    step = Step([(1, 6), (4, 9), (1, 7)], dtype=dtype, cache_dtype=cache_dtype)
    clean, slot = step.attend(), int(step.metadata.slot_mapping[5])
    infinite = torch.full((1, 2, 8), float("inf"), dtype=dtype)
    write_kv_cache(infinite, infinite, step.cache, torch.tensor([slot]))
    result = step.attend()
    assert result[5].isnan().all()
    assert torch.equal(result[:5], clean[:5])


def test_an_empty_step():
    step = Step([])
    assert step.attend().shape == (0, 6, 8)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_one_key_value_head(num_heads):
    step = Step(STEPS["mixed"], num_heads=num_heads, num_kv_heads=1)
    torch.testing.assert_close(step.attend().double(), step.expected(), atol=1e-5, rtol=1e-5)


def test_small_groups_give_the_same(monkeypatch):
    step = Step([(1, 3), (1, 17), (1, 8), (1, 20)])
    monkeypatch.setattr("wavetrain_kernels.reference.attention_plan._MAX_GROUP_TOKENS", 2 * BLOCK_SIZE)
    torch.testing.assert_close(step.attend().double(), step.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("sliding_window", [None, 2, 5])
@pytest.mark.parametrize("max_queries", [1, 3, 4])
def test_chunks_are_split_without_a_seam(monkeypatch, max_queries, sliding_window, soft_cap):
    monkeypatch.setattr("wavetrain_kernels.reference.attention_plan._MAX_CHUNK_QUERIES", max_queries)
    step = Step([(9, 9), (7, 20)])
    result = step.attend(sliding_window=sliding_window, soft_cap=soft_cap).double()
    torch.testing.assert_close(result, step.expected(sliding_window, soft_cap), atol=1e-5, rtol=1e-5)


def test_layers_share_a_step_whatever_their_windows():
    step = Step(STEPS["mixed"])
    for sliding_window in (None, 3, None, 3):
        expected = step.expected(sliding_window)
        torch.testing.assert_close(step.attend(sliding_window=sliding_window).double(), expected, atol=1e-5, rtol=1e-5)
    assert len(step.metadata.plans) == 2


def test_a_long_prompt_with_a_window():
    """Long enough that whole tiles of keys are masked for a query."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, window = 1100, 70
    cache = ops.KVCache(*torch.randn(2, 69, 1, 16, 8, generator=generator))
    query = torch.randn(num_tokens, 2, 8, generator=generator)
    metadata = ops.AttentionMetadata.build(
        [num_tokens], [num_tokens], torch.arange(69, dtype=torch.int32)[None], torch.full((num_tokens,), -1)
    )
    key, value = (c.transpose(1, 2).reshape(-1, 8)[:num_tokens].double() for c in (cache.key, cache.value))
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    scores = torch.einsum("thd,sd->hts", query.double(), key) * 0.3
    scores.masked_fill_((distance < 0) | (distance >= window), -math.inf)
    expected = torch.einsum("hts,sd->thd", scores.softmax(-1), value)
    result = ops.paged_attention(query, cache, metadata, scale=0.3, sliding_window=window)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


def test_strided_inputs():
    step = Step(STEPS["mixed"])
    fused = torch.randn(step.query.shape[0], 10, 8)
    fused[:, :6] = step.query
    result = ops.paged_attention(fused[:, :6], step.cache, step.metadata, scale=0.3)
    torch.testing.assert_close(result, step.attend())


def test_a_row_of_nan_stays_alone():
    step = Step([(1, 6), (4, 9), (1, 7)])
    clean = step.attend()
    slots = step.metadata.slot_mapping
    step.cache.value[int(slots[5]) // BLOCK_SIZE] = float("nan")
    step.cache.key[int(slots[5]) // BLOCK_SIZE] = float("nan")
    result = step.attend()
    assert result[5].isnan().all()
    assert torch.equal(result[:5], clean[:5])


def test_metadata_reads_its_numbers_back():
    built = Step(STEPS["mixed"]).metadata
    plain = ops.AttentionMetadata(
        query_start_loc=built.query_start_loc,
        seq_lens=built.seq_lens,
        block_tables=built.block_tables,
        slot_mapping=built.slot_mapping,
        max_query_len=6,
        max_seq_len=33,
    )
    assert plain.host_query_start_loc == built.host_query_start_loc == [0, 1, 7, 8, 11, 12, 14]
    assert plain.host_seq_lens == built.host_seq_lens == [12, 6, 5, 21, 33, 2]
    assert (plain.num_requests, plain.num_tokens) == (6, 14)


def metadata_fields(**changes) -> dict:
    fields = {
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([4, 2], dtype=torch.int32),
        "block_tables": torch.zeros((2, 1), dtype=torch.int32),
        "slot_mapping": torch.tensor([3, 4, 5]),
        "max_query_len": 2,
        "max_seq_len": 4,
    }
    return fields | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_start_loc": torch.zeros((1, 3), dtype=torch.int32)}, ShapeError, "query_start_loc must have 1 dim"),
        ({"seq_lens": torch.zeros((), dtype=torch.int32)}, ShapeError, "seq_lens must have 1 dim"),
        ({"block_tables": torch.zeros(2, dtype=torch.int32)}, ShapeError, "block_tables must have 2 dim"),
        ({"slot_mapping": torch.zeros((3, 1), dtype=torch.int64)}, ShapeError, "slot_mapping must have 1 dim"),
        ({"query_start_loc": torch.tensor([0, 1, 3])}, DtypeError, "query_start_loc must be torch.int32"),
        ({"seq_lens": torch.tensor([4, 2])}, DtypeError, "seq_lens must be torch.int32"),
        ({"block_tables": torch.zeros((2, 1))}, DtypeError, "block_tables must be torch.int32"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int32)}, DtypeError, "slot_mapping must be torch.int64"),
        ({"query_start_loc": torch.tensor([0, 3], dtype=torch.int32)}, ShapeError, "must have 3 entries, got 2"),
        ({"block_tables": torch.zeros((3, 1), dtype=torch.int32)}, ShapeError, "must have 2 rows, got 3"),
        ({"seq_lens": torch.tensor([4, 0, 2, 0], dtype=torch.int32)[::2]}, ShapeError, "seq_lens must be dense"),
        ({"block_tables": torch.zeros((2, 4), dtype=torch.int32)[:, ::2]}, ShapeError, "block_tables must be dense"),
        ({"host_seq_lens": [4]}, ShapeError, "as long as their tensors"),
        ({"host_query_start_loc": [0, 3]}, ShapeError, "as long as their tensors"),
        ({"query_start_loc": torch.tensor([1, 1, 3], dtype=torch.int32)}, ShapeError, "goes from 1 to 3"),
        ({"slot_mapping": torch.tensor([3, 4])}, ShapeError, "0 to the 2 tokens"),
        ({"query_start_loc": torch.tensor([0, 5, 3], dtype=torch.int32)}, ShapeError, "row 0 has 5 queries"),
        ({"seq_lens": torch.tensor([4, 1], dtype=torch.int32)}, ShapeError, "row 1 has 2 queries in a context of 1"),
        ({"max_query_len": 3}, ShapeError, "max_query_len is 2, not 3"),
        ({"max_seq_len": 3}, ShapeError, "max_seq_len is 4, not 3"),
    ],
)
def test_metadata_that_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        ops.AttentionMetadata(**metadata_fields(**changes))


SCALES = torch.ones(NUM_BLOCKS, 2, BLOCK_SIZE, dtype=torch.bfloat16)
BAD_CACHES = [
    (lambda c: (c[0][0], c[1][0]), ShapeError, "must be .num_blocks, Hkv, block_size, D"),
    (lambda c: (c[0], c[1][1:]), ShapeError, "must be .num_blocks, Hkv, block_size, D"),
    (lambda c: (c[0][..., :4].contiguous(), c[1][..., :4].contiguous()), ShapeError, "heads of 4 dimensions, got 8"),
    (lambda c: (c[0][:, :, ::2], c[1][:, :, ::2]), ShapeError, "must be contiguous"),
    (lambda c: (c[0].half(), c[1]), DtypeError, "cache holds torch.float16 and torch.float32"),
    (lambda c: (c[0], c[1].half()), DtypeError, "cache holds torch.float32 and torch.float16"),
    (lambda c: (c[0].char(), c[1]), DtypeError, "cache holds torch.int8 and torch.float32"),
    (lambda c: (c[0].char(), c[1].char()), ShapeError, "a cache of torch.int8 has a key_scale"),
    (lambda c: (c[0].char(), c[1].char(), SCALES), ShapeError, "a cache of torch.int8 has a value_scale"),
    (lambda c: (*c, SCALES), ShapeError, "a cache of torch.float32 has no key_scale"),
    (lambda c: (c[0].char(), c[1].char(), SCALES, SCALES[1:]), ShapeError, "value_scale must be contiguous"),
    (lambda c: (c[0].char(), c[1].char(), SCALES.mT.contiguous().mT, SCALES), ShapeError, "key_scale must be contig"),
    (lambda c: (c[0].char(), c[1].char(), SCALES.float(), SCALES), DtypeError, "key_scale must be torch.bfloat16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CACHES)
def test_caches_that_do_not_fit(change, error, message):
    step = Step([(1, 4)])
    cache = ops.KVCache(*change((step.cache.key, step.cache.value)))
    with pytest.raises(error, match=message):
        ops.paged_attention(step.query, cache, step.metadata, scale=1.0)


@pytest.mark.parametrize(
    ("query", "options", "error", "message"),
    [
        (torch.zeros(2, 6, 8), {}, ShapeError, "with T = 1"),
        (torch.zeros(1, 48), {}, ShapeError, "with T = 1"),
        (torch.zeros(1, 6, 8, dtype=torch.int32), {}, DtypeError, "query must be floating point"),
        (torch.zeros(1, 5, 8), {}, ShapeError, "5 query heads are not a multiple of 2"),
        (torch.zeros(1, 6, 8), {"sliding_window": 0}, ShapeError, "sliding_window must be at least 1, got 0"),
        (torch.zeros(1, 6, 8), {"soft_cap": 0.0}, ShapeError, "soft_cap must be positive, got 0.0"),
        (torch.zeros(1, 6, 8), {"scale": 0.0}, ShapeError, "scale must be positive, got 0.0"),
        (torch.zeros(1, 6, 8), {"scale": float("nan")}, ShapeError, "scale must be positive, got nan"),
    ],
)
def test_a_query_that_does_not_fit(query, options, error, message):
    step = Step([(1, 4)])
    with pytest.raises(error, match=message):
        ops.paged_attention(query, step.cache, step.metadata, **{"scale": 1.0} | options)


def test_block_tables_too_narrow():
    metadata = ops.AttentionMetadata.build([1], [9], torch.zeros((1, 2), dtype=torch.int32), torch.tensor([0]))
    with pytest.raises(ShapeError, match="2 columns of 4 tokens cannot hold a context of 9"):
        ops.paged_attention(torch.zeros(1, 6, 8), make_cache(2, 8), metadata, scale=1.0)
