# SPDX-License-Identifier: Apache-2.0
"""Sampling operations against transformers' logits processors, and the generator against plain Python integers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.reference.kernels import REFERENCE

SIZES = [1, 2, 31, 127, 128, 129, 1000, 5000]

pytestmark = pytest.mark.usefixtures("kernels")


def random_logits(num_rows: int, vocab_size: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def keep(logits: torch.Tensor, **filters: torch.Tensor) -> torch.Tensor:
    """The logits with -inf for those that the filters exclude."""
    lowest = ops.filter_thresholds(logits, torch.ones(logits.shape[0]), **filters)
    return torch.where(logits < lowest[:, None], -math.inf, logits)


def draw(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens at temperature 1."""
    return ops.sample(logits, seeds, positions, torch.ones(logits.shape[0]))[0]


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("top_k", [1, 3, 60, 700])
def test_top_k_is_hugging_face(vocab_size, top_k):
    logits = random_logits(3, vocab_size)
    expected = TopKLogitsWarper(top_k)(None, logits.clone())
    logits = keep(logits, top_k=ints(top_k, top_k, top_k))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p_is_hugging_face(vocab_size, top_p, scale):
    """A flat distribution needs most of the vocabulary, a peaked one a few tokens."""
    logits = random_logits(3, vocab_size, scale)
    expected = TopPLogitsWarper(top_p)(None, logits.clone())
    logits = keep(logits, top_p=floats(top_p, top_p, top_p))
    num_different = (logits.isinf() != expected.isinf()).sum(-1)
    # Sums in another order may decide about the very last token otherwise.
    assert num_different.max() <= (1 if vocab_size >= 1000 else 0)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_is_hugging_face(vocab_size, min_p):
    logits = random_logits(3, vocab_size)
    expected = MinPLogitsWarper(min_p)(None, logits.clone())
    logits = keep(logits, min_p=floats(min_p, min_p, min_p))
    assert torch.equal(logits, expected)


def test_filters_follow_each_other_and_rows_differ():
    logits = random_logits(5, 500)
    top_k, top_p, min_p = (0, 20, 7, 0, 500), (0.8, 1.0, 0.6, 1.0, 0.7), (0.0, 0.05, 0.02, 0.0, 0.1)
    expected = logits.clone()
    for row in range(5):
        if min_p[row]:
            expected[row] = MinPLogitsWarper(min_p[row])(None, expected[row : row + 1])
        if top_k[row]:
            expected[row] = TopKLogitsWarper(top_k[row])(None, expected[row : row + 1])
        if top_p[row] < 1.0:
            expected[row] = TopPLogitsWarper(top_p[row])(None, expected[row : row + 1])
    kept = keep(logits, top_k=ints(*top_k), top_p=floats(*top_p), min_p=floats(*min_p))
    assert torch.equal(kept, expected)


def test_equals_of_the_last_kept_token_are_kept():
    logits = floats(5, 4, 4, 4, 1)[None]
    assert torch.equal(keep(logits, top_k=ints(2)), floats(5, 4, 4, 4, -math.inf)[None])
    assert not keep(torch.zeros(1, 300), top_p=floats(0.5)).isinf().any()


def test_filters_that_are_off_change_nothing():
    logits = random_logits(2, 300)
    for filters in ({}, {"top_k": ints(0, -1), "top_p": floats(1, 1), "min_p": floats(0, 0)}):
        assert ops.filter_thresholds(logits, floats(1, 0.5), **filters).tolist() == [-math.inf] * 2
    everything = {"top_k": ints(3, 3), "top_p": floats(0.5, 0.5), "min_p": floats(0.1, 0.1)}
    assert ops.filter_thresholds(logits, floats(0, 1), **everything).isinf().tolist() == [True, False]
    assert ops.filter_thresholds(logits[:0], floats(), top_k=ints(), top_p=floats(), min_p=floats()).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_divided_by_the_temperature_and_left_alone(dtype):
    logits = random_logits(4, 1003).to(dtype)[:, 1:-1]
    before, temperature = logits.clone(), floats(0.3, 1.0, 2.5, 0.7)
    filters = {"top_k": ints(9, 0, 30, 0), "top_p": floats(1.0, 0.8, 0.9, 0.999), "min_p": floats(0, 0, 0.1, 0)}
    scaled = logits.float() / temperature[:, None]
    lowest = ops.filter_thresholds(logits, temperature, **filters)
    assert torch.equal(lowest, ops.filter_thresholds(scaled, torch.ones(4), **filters))
    seeds, positions = ints(1, 2, 3, 4), ints(5, 6, 7, 8)
    drawn, best = ops.sample(logits, seeds, positions, temperature, lowest)
    assert torch.equal(best, logits.float().amax(-1))
    assert torch.equal(drawn, draw(keep(scaled, **filters), seeds, positions))
    assert torch.equal(logits, before)


def test_a_row_without_temperature_gets_its_likeliest_token():
    logits = random_logits(6, 700)
    logits[1, 300:] = logits[1, 300]
    logits[2, 699], logits[3, 600], logits[4], logits[5, 5:] = math.inf, math.nan, -math.inf, 50.0
    temperature = floats(0, 0, 0, 0, 0, 0)
    drawn, best = ops.sample(logits, torch.arange(6), torch.arange(6), temperature, torch.full((6,), -math.inf))
    expected, expected_best = ops.sample_greedy(logits)
    assert torch.equal(drawn, expected)
    assert torch.equal(best.nan_to_num(), expected_best.nan_to_num())
    temperature[::2] = 1.0
    mixed = ops.sample(logits, torch.arange(6), torch.arange(6), temperature)
    assert mixed[0][1::2].tolist() == expected[1::2].tolist()
    assert mixed[0][0] == draw(logits[:1], ints(0), ints(0))[0]
    assert mixed[1].isfinite().tolist() == [True, True, False, False, False, True]


def test_penalties_are_their_definition():
    logits = random_logits(3, 50)
    logits[0, 4] = -math.inf
    prompts, outputs = [[1, 4, 9], [7], [3, 3, 2]], [[4, 4, 30], [], [2]]
    repetition, presence, frequency = floats(1.5, 0.5, 1.0), floats(0.3, 0.9, -0.2), floats(0.25, 1.0, 0.5)
    inputs = [torch.tensor([p + o]) for p, o in zip(prompts, outputs, strict=True)]
    expected = torch.cat(
        [
            RepetitionPenaltyLogitsProcessor(r)(i, logits[n : n + 1])
            for n, (r, i) in enumerate(zip(repetition.tolist(), inputs, strict=True))
        ]
    )
    for row, output in enumerate(outputs):
        for token_id in set(output):
            expected[row, token_id] -= presence[row] + frequency[row] * output.count(token_id)
    token_ids = torch.tensor([[1, 4, 9, 30], [7, 7, 7, 7], [3, 2, 2, 2]])
    counts = torch.tensor([[0, 2, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.int32)
    ops.apply_penalties(logits, token_ids, counts, repetition, presence, frequency)
    torch.testing.assert_close(logits, expected)


def python_token(logits: list[float], seed: int, position: int) -> int:
    """The documented generator and draw, in unbounded integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix((mix(seed & mask) + position) & mask)

    def noise(counter: int) -> float:
        u = ((mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & mask) >> 12) + 0.5) / 2**52
        return -math.log(-math.log(u))

    weights = [math.exp(x - max(logits)) for x in logits]
    starts = range(0, len(logits), 128)
    group = max(starts, key=lambda start: math.log(sum(weights[start : start + 128])) + noise(-2 - start // 128))
    within = range(group, min(group + 128, len(logits)))
    return max(within, key=lambda token_id: math.log(weights[token_id]) + noise(token_id))


@pytest.mark.parametrize("vocab_size", [1, 5, 128, 300, 1024])
def test_the_draw_is_the_documented_one(vocab_size):
    logits = random_logits(20, vocab_size, 1.0)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63)] * 4
    positions = [n * n * 1000 for n in range(20)]
    drawn = draw(logits, ints(*seeds), ints(*positions)).tolist()
    rows = zip(logits.tolist(), seeds, positions, strict=True)
    assert drawn == [python_token(row, seed, position) for row, seed, position in rows]


# Rows of these are divided between threads, some in the middle.
LARGE = [(1, 70001), (3, 40000), (130, 1003)]


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(("num_rows", "vocab_size"), LARGE)
def test_tokens_are_those_of_the_reference(num_rows, vocab_size, scale):
    logits = random_logits(num_rows, vocab_size, scale)
    seeds, positions = torch.arange(num_rows) * 7919, torch.arange(num_rows)
    temperature = torch.arange(num_rows) % 4 / 2.0
    temperature[0] = 1.0
    lowest = torch.where(torch.arange(num_rows) % 2 == 0, -math.inf, logits.amax(-1) / temperature - 3.0)
    for threshold in (None, lowest):
        expected, best = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
        REFERENCE.sample(expected, best, logits, seeds, positions, temperature, threshold)
        drawn = ops.sample(logits, seeds, positions, temperature, threshold)
        assert torch.equal(drawn[0], expected)
        assert torch.equal(drawn[1], best)
    for row in (0, num_rows - 1):
        one = slice(row, row + 1)
        assert ops.sample(logits[one], seeds[one], positions[one], temperature[one], lowest[one])[0] == drawn[0][row]


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(("num_rows", "vocab_size"), LARGE)
def test_kept_tokens_are_those_of_the_reference(num_rows, vocab_size, scale):
    generator = torch.Generator().manual_seed(num_rows)
    logits = random_logits(num_rows, vocab_size, scale)
    top_k = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    top_p, min_p = torch.rand(2, num_rows, generator=generator) * torch.tensor([[0.98], [0.3]]) + 0.01
    top_k[::3], min_p[1::3] = 40, 0.0
    for filters in ((top_k, None, None), (None, top_p, None), (None, None, min_p), (top_k, top_p, min_p)):
        is_kept = ~keep(logits, top_k=filters[0], top_p=filters[1], min_p=filters[2]).isinf()
        expected = torch.empty(num_rows)
        REFERENCE.filter_thresholds(expected, logits, torch.ones(num_rows), *filters)
        num_different = (is_kept != (logits >= expected[:, None])).sum(-1).max()
        # A sum in another order may decide about the last of many almost equal tokens otherwise.
        assert num_different <= (0 if filters[1] is None else 3)


@pytest.mark.parametrize(("num_rows", "vocab_size"), LARGE)
def test_greedy_finds_the_first_wherever_it_is(num_rows, vocab_size):
    for column in (0, 17, vocab_size // 2, vocab_size - 1):
        logits = random_logits(num_rows, vocab_size)
        for value in (100.0, math.inf, math.nan):
            logits[:, column] = logits[:, -1] = value
            token_ids, best = ops.sample_greedy(logits)
            assert token_ids.tolist() == [column] * num_rows
            assert torch.equal(best.nan_to_num(), logits[:, column].nan_to_num())
    strided = random_logits(num_rows, vocab_size + 3)[:, 1:-2]
    assert torch.equal(ops.sample_greedy(strided)[0], strided.argmax(-1))
    assert ops.sample_greedy(strided[:0])[0].shape == (0,)


@pytest.mark.parametrize("k", [0, 3, 20000])
def test_the_largest_of_a_long_row(k):
    logits, token_ids = random_logits(3, 40000), ints(5, 39999, 0)
    ids, logprobs, ranks = ops.top_logprobs(logits, token_ids, k)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.gather(1, ids[:, 1:]), logits.sort(-1, descending=True).values[:, :k])
    assert torch.equal(ranks, (logits > logits.gather(1, token_ids[:, None])).sum(-1) + 1)


def test_log_probabilities_of_an_invalid_row_are_nan_of_tokens_of_the_vocabulary():
    logits = random_logits(4, 300)
    logits[0, 7], logits[1, 299], logits[2] = math.nan, math.inf, -math.inf
    ids, logprobs, _ = ops.top_logprobs(logits, ints(1, 2, 3, 4), 5)
    assert logprobs.isnan().any(-1).tolist() == [True, True, True, False]
    assert ((ids >= 0) & (ids < 300)).all()


def test_masked_tokens_are_the_last_of_the_log_probabilities():
    logits = torch.full((1, 200), -math.inf)
    logits[0, 150], logits[0, 20] = 1.0, 2.0
    ids, logprobs, ranks = ops.top_logprobs(logits, ints(0), 200)
    assert ids[0, 1:3].tolist() == [20, 150]
    assert sorted(ids[0, 1:].tolist()) == list(range(200))
    assert logprobs[0, 3:].isinf().all()
    assert ranks.tolist() == [3]


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("vocab_size", "critical"), [(5, 18.5), (200, 270.0), (300, 385.0)])
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_distribution(vocab_size, critical, vary):
    """Chi-square below its 99.9 % quantile, over fixed counters: deterministic."""
    num_draws = 40000
    logits = random_logits(1, vocab_size, 0.8)
    counter, fixed = torch.arange(num_draws), torch.full((num_draws,), 1234)
    seeds, positions = (fixed, counter) if vary == "position" else (counter, fixed)
    drawn = draw(logits.expand(num_draws, -1).contiguous(), seeds, positions)
    assert chi_square(drawn.bincount(minlength=vocab_size), logits[0].softmax(-1)) < critical


def test_neighbouring_positions_are_independent():
    num_draws = 20000
    logits = torch.zeros(num_draws, 4)
    drawn = draw(logits, torch.full((num_draws,), 7), torch.arange(num_draws))
    pairs = (drawn[:-1] * 4 + drawn[1:]).bincount(minlength=16)
    assert chi_square(pairs, torch.full((16,), 1 / 16)) < 37.7


def test_a_forbidden_token_is_never_drawn():
    logits = torch.full((4000, 260), -math.inf)
    logits[:, [3, 200, 259]] = 0.0
    drawn = draw(logits, torch.zeros(4000).long(), torch.arange(4000))
    assert set(drawn.tolist()) == {3, 200, 259}


def test_invalid_rows_draw_some_token_of_the_vocabulary():
    logits = torch.zeros(4, 130)
    logits[0], logits[1, 3], logits[2, 129], logits[3] = math.nan, math.nan, math.inf, -math.inf
    lowest = ops.filter_thresholds(
        logits,
        torch.ones(4),
        top_k=ints(3, 3, 3, 3),
        top_p=floats(0.5, 0.5, 0.5, 0.5),
        min_p=floats(0.1, 0.1, 0.1, 0.1),
    )
    assert lowest.tolist() == [-math.inf] * 4
    for threshold in (None, lowest, torch.ones(4)):
        drawn, best = ops.sample(logits, ints(1, 2, 3, 4), ints(1, 2, 3, 4), torch.ones(4), threshold)
        assert ((drawn >= 0) & (drawn < 130)).all()
        assert not best.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy(dtype):
    logits = random_logits(5, 300).to(dtype)
    logits[1, 7], logits[2, 7], logits[3], logits[4, 9] = math.nan, math.inf, -math.inf, -math.inf
    token_ids, best = ops.sample_greedy(logits)
    assert token_ids[0] == logits[0].argmax()
    assert best[0] == logits[0].max()
    assert best.isfinite().tolist() == [True, False, False, False, True]


def test_greedy_takes_the_first_of_equals():
    assert ops.sample_greedy(torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]]).repeat(3, 20))[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_top_logprobs_are_a_sort(vocab_size, dtype):
    logits = random_logits(4, vocab_size).to(dtype)
    token_ids = ints(0, vocab_size - 1, vocab_size // 2, int(logits[3].float().argmax()))
    k = min(5, vocab_size)
    ids, logprobs, ranks = ops.top_logprobs(logits, token_ids, k)
    expected = logits.float().log_softmax(-1)
    assert torch.equal(ids[:, 0], token_ids)
    torch.testing.assert_close(logprobs, expected.gather(1, ids))
    torch.testing.assert_close(logprobs[:, 1:], expected.sort(-1, descending=True).values[:, :k])
    assert all(len(set(row[1:])) == k for row in ids.tolist())
    assert ranks.tolist() == [
        1 + sum(other > row[token_id] for other in row)
        for row, token_id in zip(expected.tolist(), token_ids.tolist(), strict=True)
    ]
    assert ops.top_logprobs(logits, token_ids, 0)[0].shape == (4, 1)
    assert ops.top_logprobs(logits[:0], token_ids[:0], k)[0].shape == (0, 1 + k)


GOOD_PENALTIES = {
    "logits": torch.zeros(2, 9),
    "token_ids": torch.zeros(2, 3, dtype=torch.int64),
    "output_counts": torch.zeros(2, 3, dtype=torch.int32),
    "repetition": torch.ones(2),
    "presence": torch.zeros(2),
    "frequency": torch.zeros(2),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(9)}, ShapeError, "logits must be"),
        ({"logits": torch.zeros(2, 9).half()}, DtypeError, "logits must be float32"),
        ({"logits": torch.zeros(9, 2).T}, ShapeError, "logits must be contiguous"),
        ({"token_ids": torch.zeros(1, 3).long()}, ShapeError, "token_ids and output_counts"),
        ({"token_ids": torch.zeros(2).long()}, ShapeError, "token_ids and output_counts"),
        ({"output_counts": torch.zeros(2, 4).int()}, ShapeError, "token_ids and output_counts"),
        ({"token_ids": torch.zeros(2, 3).int()}, DtypeError, "token_ids must be int64"),
        ({"output_counts": torch.zeros(2, 3).long()}, DtypeError, "output_counts int32"),
        ({"repetition": torch.ones(3)}, ShapeError, "repetition must be"),
        ({"presence": torch.ones(2).double()}, DtypeError, "presence must be"),
        ({"frequency": torch.ones(2, 1)}, ShapeError, "frequency must be"),
        ({"frequency": torch.ones(2, 3)[:, 0]}, ShapeError, "frequency must be contiguous"),
    ],
)
def test_penalties_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        ops.apply_penalties(**GOOD_PENALTIES | changes)


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ({"top_k": ints(1)}, ShapeError, "top_k must be .2."),
        ({"top_k": floats(1, 1)}, DtypeError, "top_k must be torch.int64"),
        ({"top_p": floats(1)}, ShapeError, "top_p must be .2."),
        ({"top_p": ints(1, 1)}, DtypeError, "top_p must be torch.float32"),
        ({"min_p": floats(0)}, ShapeError, "min_p must be .2."),
        ({"min_p": ints(0, 0)}, DtypeError, "min_p must be torch.float32"),
        ({"temperature": floats(1)}, ShapeError, "temperature must be .2."),
        ({"temperature": ints(1, 1)}, DtypeError, "temperature must be torch.float32"),
        ({"temperature": torch.ones(2, 3)[:, 0]}, ShapeError, "temperature must be contiguous"),
        ({"top_k": torch.ones(2, 3).long()[:, 0]}, ShapeError, "top_k must be contiguous"),
        ({"logits": torch.zeros(2)}, ShapeError, "logits must be"),
        ({"logits": torch.zeros(2, 0)}, ShapeError, "logits must be"),
        ({"logits": torch.zeros(2, 9).int()}, DtypeError, "logits must be floating"),
    ],
)
def test_filters_that_do_not_fit(filters, error, message):
    with pytest.raises(error, match=message):
        ops.filter_thresholds(**{"logits": torch.zeros(2, 9), "temperature": floats(1, 1)} | filters)


GOOD_DRAW = {
    "logits": torch.zeros(2, 3),
    "seeds": ints(1, 2),
    "positions": ints(1, 2),
    "temperature": floats(1, 1),
    "lowest": floats(0, 0),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 0)}, ShapeError, "logits must be"),
        ({"logits": torch.zeros(2, 3).int()}, DtypeError, "logits must be floating"),
        ({"seeds": ints(1)}, ShapeError, "seeds must be"),
        ({"positions": ints(1, 2).int()}, DtypeError, "positions must be"),
        ({"temperature": floats(1)}, ShapeError, "temperature must be"),
        ({"temperature": ints(1, 1)}, DtypeError, "temperature must be"),
        ({"lowest": floats(1, 1, 1)}, ShapeError, "lowest must be"),
        ({"lowest": floats(1, 1).double()}, DtypeError, "lowest must be"),
        ({"seeds": ints(1, 2, 3, 4)[::2]}, ShapeError, "seeds must be contiguous, its elements are 2 apart"),
    ],
)
def test_draws_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        ops.sample(**GOOD_DRAW | changes)


def test_greedy_that_does_not_fit():
    with pytest.raises(ShapeError, match="logits must be"):
        ops.sample_greedy(torch.zeros(3))
    with pytest.raises(DtypeError, match="logits must be floating"):
        ops.sample_greedy(torch.zeros(2, 3).int())


def test_logprobs_that_do_not_fit():
    with pytest.raises(ShapeError, match="logits must be"):
        ops.top_logprobs(torch.zeros(3), ints(1), 1)
    with pytest.raises(DtypeError, match="logits must be floating"):
        ops.top_logprobs(torch.zeros(2, 3).int(), ints(1, 2), 1)
    with pytest.raises(ShapeError, match="k must be between 0 and 3, got 4"):
        ops.top_logprobs(torch.zeros(2, 3), ints(1, 2), 4)
    with pytest.raises(ShapeError, match="token_ids must be"):
        ops.top_logprobs(torch.zeros(2, 3), ints(1), 1)
    with pytest.raises(DtypeError, match="token_ids must be"):
        ops.top_logprobs(torch.zeros(2, 3), ints(1, 2).int(), 1)
