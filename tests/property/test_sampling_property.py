# SPDX-License-Identifier: Apache-2.0
"""A row's token depends on the row alone, and is always one that its filters allow."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_engine.sampling.sampler import Sampler
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB_SIZES = st.sampled_from([1, 2, 33, 128, 150, 1000, 3000])

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 2, 40]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([None, {0: 1.5}]),
    min_tokens=st.sampled_from([0, 5]),
    seed=st.integers(-(2**63), 2**64 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)
ROWS = st.lists(st.tuples(PARAMS, st.integers(1, 9)), min_size=1, max_size=8)


def make_state(rows: list[tuple[SamplingParams, int]], vocab_size: int) -> SamplingState:
    state = SamplingState(vocab_size, CPU)
    for row, (params, num_tokens) in enumerate(rows):
        history = [(row + i) % vocab_size for i in range(num_tokens)]
        # The last token may be ruled out as EOS; the first may not, so that something is left.
        eos_token_ids = [vocab_size - 1] if vocab_size > 1 else []
        state.add(row, params, history, 1, eos_token_ids, params.seed or 0)
    return state


def make_logits(num_rows: int, vocab_size: int, seed: int, is_coarse: bool) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if is_coarse else logits  # coarse logits are full of ties


@settings(deadline=None, max_examples=60, derandomize=True)
@given(rows=ROWS, vocab_size=VOCAB_SIZES, seed=st.integers(0, 1000), is_coarse=st.booleans(), data=st.data())
def test_a_rows_token_depends_on_the_row_alone(rows, vocab_size, seed, is_coarse, data):
    state = make_state(rows, vocab_size)
    logits = make_logits(len(rows), vocab_size, seed, is_coarse)
    together = Sampler().sample(logits, state.batch(list(range(len(rows)))))
    assert together.errors == {}
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True, min_size=1))
    some = Sampler().sample(logits[order], state.batch(order))
    alone = [Sampler().sample(logits[row : row + 1], state.batch([row])) for row in order]
    assert some.token_ids == [together.token_ids[row] for row in order]
    assert [result.token_ids[0] for result in alone] == some.token_ids


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    vocab_size=VOCAB_SIZES,
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 1000),
    is_coarse=st.booleans(),
)
def test_the_token_is_in_the_set_that_the_filters_leave(vocab_size, top_k, top_p, min_p, seed, is_coarse):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, temperature=1.5)
    num_rows = 20
    state = SamplingState(vocab_size, CPU)
    for row in range(num_rows):
        state.add(row, params, [0] * (row + 1), 1, [], seed)
    logits = make_logits(1, vocab_size, seed, is_coarse).expand(num_rows, -1)
    drawn = Sampler().sample(logits, state.batch(list(range(num_rows)))).token_ids

    probs = (logits[0].double() / 1.5).softmax(-1)
    if min_p:
        probs = torch.where(probs >= probs.max() * min_p * (1 - 1e-5), probs, 0.0)
    if 0 < top_k < vocab_size:
        probs = torch.where(probs >= probs.topk(top_k).values[-1], probs, 0.0)
    probs /= probs.sum()
    ordered = probs.sort(descending=True).values
    before = ordered.cumsum(0) - ordered
    lowest = ordered[before < top_p + 1e-5].min()
    allowed = {token_id for token_id, prob in enumerate(probs.tolist()) if prob > 0 and prob >= lowest}
    assert set(drawn) <= allowed


def test_large_vocabulary_alone_and_in_a_batch():
    """Sizes at which torch splits the work of one row over threads."""
    vocab_size, num_rows = 150_001, 3
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    rows = [
        (SamplingParams(seed=1, top_p=0.9), 3),
        (SamplingParams(seed=2), 3),
        (SamplingParams(seed=3, top_k=50, min_p=0.01), 3),
    ]
    state = make_state(rows, vocab_size)
    for _ in range(5):
        together = Sampler().sample(logits, state.batch([0, 1, 2])).token_ids
        alone = [Sampler().sample(logits[row : row + 1], state.batch([row])).token_ids[0] for row in range(num_rows)]
        assert alone == together
        state.append([0, 1, 2], together)
