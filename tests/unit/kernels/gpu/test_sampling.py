# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens on the GPU, against the reference: greedy, the draw, filters, penalties, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.gpu import filters, greedy, gumbel, logprobs, penalties
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kernels import REFERENCE

# The interpreter is NumPy's: it warns of infinities that meet, and of ranges whose end a kernel computed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

INF, NAN = math.inf, math.nan
SIZES = [(1, 1), (3, 17), (2, 855), (5, 128), (1, 32000)]


def logits_of(device: torch.device, num_rows: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=generator) * scale).to(device)


def some(values: list[float], num_rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number for each row, in turn."""
    return torch.tensor([values[row % len(values)] for row in range(num_rows)], dtype=dtype, device=device)


def greedy_of(function: Callable[..., None], logits: Tensor) -> tuple[Tensor, Tensor]:
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    best = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
    function(token_ids, best, logits)
    return token_ids, best


def draw(function: Callable[..., None], logits: Tensor, *args: Tensor | None) -> tuple[Tensor, Tensor]:
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    best = torch.empty(logits.shape[0], device=logits.device)
    function(token_ids, best, logits, *args)
    return token_ids, best


def kept_by(function: Callable[..., None], logits: Tensor, temperature: Tensor, *args: Tensor | None) -> Tensor:
    lowest = torch.empty(logits.shape[0], device=logits.device)
    function(lowest, logits, temperature, *args)
    return logits.float() / temperature.masked_fill(temperature == 0, 1.0)[:, None] >= lowest[:, None]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].nan_to_num(nan=7e30), expected[1].nan_to_num(nan=7e30))


@pytest.mark.parametrize(("num_rows", "vocab_size"), [*SIZES, (2, 5000)])
def test_greedy(device, dtype, num_rows, vocab_size):
    logits = logits_of(device, num_rows, vocab_size).to(dtype)
    assert_same(greedy_of(greedy.sample_greedy, logits), greedy_of(REFERENCE.sample_greedy, logits))


def test_greedy_takes_the_first_of_equals_and_tells_of_rows_without_a_largest(device, dtype):
    logits = logits_of(device, 7, 5000).to(dtype)
    logits[0, 4999] = logits[0, 4500] = logits[0, 4600] = 99.0
    logits[1, 4400] = logits[1, 7] = NAN
    logits[2, 4999], logits[3], logits[4] = INF, -INF, NAN
    logits[5, 1000], logits[5, :1000], logits[5, 1001:] = -0.0, -1.0, 0.0
    logits[6, :-1] = -INF
    token_ids, best = greedy_of(greedy.sample_greedy, logits)
    assert token_ids.tolist() == [4500, 7, 4999, 0, 0, 1000, 4999]
    assert best.isfinite().tolist() == [True, False, False, False, False, True, True]
    assert_same(greedy_of(gumbel_greedy, logits.float()), greedy_of(greedy.sample_greedy, logits.float()))


def gumbel_greedy(token_ids: Tensor, best: Tensor, logits: Tensor) -> None:
    """The draw at temperature 0."""
    zeros = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    gumbel.sample(token_ids, best, logits, zeros, zeros, zeros.float(), None)


@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize(("num_rows", "vocab_size"), SIZES)
def test_draws_are_those_of_the_reference(device, dtype, num_rows, vocab_size, scale):
    logits = logits_of(device, num_rows, vocab_size, scale).to(dtype)
    temperature = some([0.7, 1.0, 0.0, 2.5], num_rows, device)
    seeds = some([0, -1, 2**62 + 12345, -(2**63), 77], num_rows, device, torch.int64)
    lowest = logits.float().amax(-1) / temperature.clamp(min=0.1) - 2.0
    for position, threshold in ((0, None), (3, lowest), (2**40, None)):
        positions = torch.arange(num_rows, device=device) + position
        args = (seeds, positions, temperature, threshold)
        assert_same(draw(gumbel.sample, logits, *args), draw(REFERENCE.sample, logits, *args))


def test_many_draws_are_those_of_the_reference(device):
    """Each row with another seed or position: a single wrong bit of the generator would show."""
    num_rows = 50
    logits = logits_of(device, 1, 300, 1.0).expand(num_rows, -1).contiguous()
    numbers = torch.arange(num_rows, device=device)
    args = (numbers * 2**57, numbers**4, torch.ones(num_rows, device=device), None)
    assert_same(draw(gumbel.sample, logits, *args), draw(REFERENCE.sample, logits, *args))


def test_invalid_rows_draw_some_token_and_say_so(device):
    logits = logits_of(device, 5, 300)
    logits[0, 150], logits[1, 200], logits[2], logits[3], logits[4, :299] = NAN, INF, -INF, NAN, -INF
    numbers = torch.arange(5, device=device)
    for temperature in (0.0, 1.0):
        for lowest in (None, torch.zeros(5, device=device)):
            args = (numbers, numbers, torch.full((5,), temperature, device=device), lowest)
            token_ids, best = draw(gumbel.sample, logits, *args)
            assert ((token_ids >= 0) & (token_ids < 300)).all()
            assert best.isfinite().tolist() == [False, False, False, False, True]
            assert token_ids[4] == 299 or lowest is not None


TOP_K, TOP_P, MIN_P = [5, 0, 800, 33, -1], [0.9, 1.0, 0.5, 0.999, 0.05], [0.0, 0.1, 0.02, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "masked"])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (5, 17), (3, 855)])
def test_filters_keep_what_the_reference_keeps(device, dtype, num_rows, vocab_size, kind):
    logits = logits_of(device, num_rows, vocab_size, 0.01 if kind == "flat" else 3.0)
    logits = (logits.round() if kind == "ties" else logits).to(dtype)
    if kind == "masked":
        logits[:, 1::2] = -INF
    temperature = some([1.0, 0.7, 2.0, 0.4, 1.3], num_rows, device)
    top_k = some(TOP_K, num_rows, device, torch.int64)
    top_p, min_p = some(TOP_P, num_rows, device), some(MIN_P, num_rows, device)
    for chosen in ((top_k, None, None), (None, top_p, None), (None, None, min_p), (top_k, top_p, min_p)):
        is_kept = kept_by(filters.filter_thresholds, logits, temperature, *chosen)
        expected = kept_by(REFERENCE.filter_thresholds, logits, temperature, *chosen)
        # A sum in another order may decide about the last of many almost equal tokens otherwise.
        num_different = (is_kept != expected).sum(-1).max()
        assert num_different <= (0 if chosen[1] is None or kind == "ties" else 1)


def test_filters_of_a_long_row(device):
    logits = logits_of(device, 2, 32000)
    temperature = torch.tensor([1.0, 0.6], device=device)
    top_k, top_p = torch.tensor([50, 0], device=device), torch.tensor([0.9, 0.95], device=device)
    chosen = (top_k, top_p, torch.zeros(2, device=device))
    is_kept = kept_by(filters.filter_thresholds, logits, temperature, *chosen)
    expected = kept_by(REFERENCE.filter_thresholds, logits, temperature, *chosen)
    assert (is_kept != expected).sum() <= 1


def test_rows_that_no_filter_touches(device):
    logits = logits_of(device, 6, 300)
    logits[0, 5], logits[1, 7], logits[2] = NAN, INF, -INF
    temperature = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0], device=device)
    top_k = torch.tensor([3, 3, 3, 3, 0, 300], device=device)
    top_p = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0], device=device)
    min_p = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0, 0.0], device=device)
    lowest = torch.empty(6, device=device)
    filters.filter_thresholds(lowest, logits, temperature, top_k, top_p, min_p)
    assert lowest.tolist() == [-INF] * 6


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    vocab_size=st.sampled_from([1, 2, 127, 129, 300]),
    seed=st.integers(0, 1000),
    decimals=st.sampled_from([0, 1, 7]),
    scale=st.sampled_from([0.001, 1.0, 20.0]),
    offset=st.sampled_from([0.0, -50.0, 1000.0]),
    temperature=st.sampled_from([0.05, 1.0, 3.0]),
    top_k=st.integers(-1, 310),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_any_filters_keep_what_the_reference_keeps(
    device, vocab_size, seed, decimals, scale, offset, temperature, top_k, top_p, min_p
):
    logits = (logits_of(torch.device("cpu"), 1, vocab_size, scale, seed).round(decimals=decimals) + offset).to(device)
    values = (
        torch.tensor([top_k], device=device),
        torch.tensor([top_p], dtype=torch.float32, device=device),
        torch.tensor([min_p], device=device),
    )
    divisor = torch.tensor([temperature], device=device)
    is_kept = kept_by(filters.filter_thresholds, logits, divisor, *values)
    expected = kept_by(REFERENCE.filter_thresholds, logits, divisor, *values)
    different = is_kept != expected
    # One value more or less, with all its equals, where a sum in another order falls on the other side.
    assert logits[different].unique().numel() <= (1 if top_p < 1.0 else 0)


@pytest.mark.parametrize(("num_rows", "vocab_size", "num_tokens"), [(1, 1, 1), (3, 17, 40), (2, 855, 1500)])
def test_penalties(device, num_rows, vocab_size, num_tokens):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = logits_of(device, num_rows, vocab_size)
    logits[0, 0] = -INF
    token_ids = torch.randint(0, vocab_size, (num_rows, num_tokens), generator=generator)
    counts = torch.randint(0, 3, (num_rows, vocab_size), generator=generator).int().gather(1, token_ids)
    values = [values.to(device) for values in (torch.rand(3, num_rows, generator=generator) + 0.5).unbind()]
    expected = logits.clone()
    REFERENCE.apply_penalties(expected, token_ids.to(device), counts.to(device), *values)
    penalties.apply_penalties(logits, token_ids.to(device), counts.to(device), *values)
    torch.testing.assert_close(logits, expected)
    penalties.apply_penalties(logits[:0], *(values[:0] for values in (token_ids, counts, *values)))


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "k"), [(1, 1, 1), (3, 17, 17), (2, 855, 20), (2, 300, 0), (1, 32000, 3)]
)
def test_top_logprobs(device, dtype, num_rows, vocab_size, k):
    logits = logits_of(device, num_rows, vocab_size).to(dtype)
    token_ids = torch.arange(num_rows, device=device) * (vocab_size - 1) // max(num_rows - 1, 1)
    ids, values, ranks = top_logprobs_of(logits, token_ids, k)
    expected = logits.float().log_softmax(-1)
    own = logits.gather(1, token_ids[:, None])
    assert torch.equal(ids[:, 0], token_ids)
    torch.testing.assert_close(values, expected.gather(1, ids))
    assert torch.equal(ranks, (logits > own).sum(-1) + 1)
    in_order = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]  # equals by their number
    assert torch.equal(ids[:, 1:], in_order)


def top_logprobs_of(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, device = logits.shape[0], logits.device
    ids = torch.empty(num_rows, 1 + k, dtype=torch.int64, device=device)
    values = torch.empty(num_rows, 1 + k, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs.top_logprobs(ids, values, ranks, logits, token_ids)
    return ids, values, ranks


def test_masked_tokens_come_last(device):
    logits = torch.full((1, 150), -INF, device=device)
    logits[:, 140], logits[:, 20] = 1.0, 2.0
    ids, values, ranks = top_logprobs_of(logits, torch.zeros(1, dtype=torch.int64, device=device), 150)
    assert ids[0, 1:4].tolist() == [20, 140, 0]
    assert sorted(ids[0, 1:].tolist()) == list(range(150))
    assert ranks[0] == 3
    assert values[0, 3:].isinf().all()


def test_invalid_rows_have_no_log_probabilities(device):
    logits = logits_of(device, 5, 200)
    logits[0, 7], logits[1, 199], logits[2], logits[3] = NAN, INF, -INF, NAN
    ids, values, _ = top_logprobs_of(logits, torch.arange(5, device=device), 4)
    assert values.isnan().all(-1).tolist() == [True, True, True, True, False]
    assert ((ids >= 0) & (ids < 200)).all()


def test_what_the_kernels_cannot_the_reference_does(device, caplog):
    logits = logits_of(device, 2, 40).double()
    assert_same(greedy_of(greedy.sample_greedy, logits), greedy_of(REFERENCE.sample_greedy, logits))
    numbers, ones = torch.arange(2, device=device), torch.ones(2, device=device)
    args = (numbers, numbers, ones, None)
    assert_same(draw(gumbel.sample, logits, *args), draw(REFERENCE.sample, logits, *args))
    assert kept_by(filters.filter_thresholds, logits, ones, numbers + 3, None, None).sum(-1).tolist() == [3, 4]
    long = logits_of(device, 1, 1100)
    ids, _, _ = top_logprobs_of(long, numbers[:1], 1050)
    assert torch.equal(ids[0, 1:], long[0].topk(1050).indices)
    assert top_logprobs_of(logits, numbers, 2)[0].shape == (2, 3)
    assert "the reference answers" in caplog.text


def test_strided_and_empty_rows(device):
    logits = logits_of(device, 4, 303)[::2, 1:-1]
    columns = logits_of(device, 301, 2).T
    numbers, temperature = torch.arange(2, device=device), torch.ones(2, device=device)
    for cut in (logits, columns):
        assert_same(greedy_of(greedy.sample_greedy, cut), greedy_of(REFERENCE.sample_greedy, cut))
        args = (numbers, numbers, temperature, None)
        assert_same(draw(gumbel.sample, cut, *args), draw(REFERENCE.sample, cut, *args))
        top_k = numbers + 4
        assert kept_by(filters.filter_thresholds, cut, temperature, top_k, None, None).sum(-1).tolist() == [4, 5]
        assert torch.equal(top_logprobs_of(cut, numbers, 3)[0][:, 1:], cut.topk(3).indices)
    nothing, no_numbers, no_floats = logits[:0], numbers[:0], temperature[:0]
    assert greedy_of(greedy.sample_greedy, nothing)[0].shape == (0,)
    assert draw(gumbel.sample, nothing, no_numbers, no_numbers, no_floats, None)[0].shape == (0,)
    assert kept_by(filters.filter_thresholds, nothing, no_floats, no_numbers, None, None).shape == (0, 301)
    assert top_logprobs_of(nothing, no_numbers, 3)[0].shape == (0, 4)


def test_a_row_alone_is_the_row_among_others(device):
    logits, numbers = logits_of(device, 3, 300), torch.arange(3, device=device)
    temperature = some([0.7, 1.0, 1.5], 3, device)
    lowest = torch.empty(3, device=device)
    top_p, top_k, min_p = some([0.9, 0.8], 3, device), numbers * 20, torch.zeros(3, device=device)
    filters.filter_thresholds(lowest, logits, temperature, top_k, top_p, min_p)
    drawn = draw(gumbel.sample, logits, numbers, numbers, temperature, lowest)
    _, values, _ = top_logprobs_of(logits, numbers, 4)
    for row in range(3):
        one = slice(row, row + 1)
        alone = torch.empty(1, device=device)
        filters.filter_thresholds(alone, logits[one], temperature[one], top_k[one], top_p[one], min_p[one])
        assert alone[0] == lowest[row]
        again = draw(gumbel.sample, logits[one], numbers[one], numbers[one], temperature[one], alone)
        assert_same(again, (drawn[0][one], drawn[1][one]))
        assert torch.equal(top_logprobs_of(logits[one], numbers[one], 4)[1], values[one])


@pytest.fixture
def gpu_ops(device, monkeypatch):
    """The public functions over the GPU's set."""
    monkeypatch.setattr(dispatch, "_CHOSEN", {device.type: GPU})


def test_the_set_has_them(device, gpu_ops):
    logits, numbers, ones = logits_of(device, 2, 300), torch.arange(2, device=device), torch.ones(2, device=device)
    lowest = ops.filter_thresholds(logits, ones, top_k=numbers + 1, top_p=ones, min_p=ones * 0)
    token_ids, best = ops.sample(logits, numbers, numbers, ones, lowest)
    assert token_ids[0] == ops.sample_greedy(logits)[0][0]
    assert torch.equal(best, logits.amax(-1))
    assert ops.top_logprobs(logits, token_ids, 1)[2].tolist()[0] == 1
    with pytest.raises(ShapeError, match="temperature must be"):
        ops.sample(logits, numbers, numbers, ones[:1])
    with pytest.raises(DtypeError, match="top_k must be"):
        ops.filter_thresholds(logits, ones, top_k=ones)
