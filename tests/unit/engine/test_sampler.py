# SPDX-License-Identifier: Apache-2.0
"""SamplingState and Sampler together, as the worker uses them: add rows, sample, append, remove."""

from __future__ import annotations

import math

import pytest
import torch

from wavetrain_engine.sampling.logprobs import prompt_logprobs, top_logprobs
from wavetrain_engine.sampling.sampler import SampledTokens, Sampler
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_kernels.errors import ShapeError

VOCAB_SIZE = 40
EOS = [38, 39]
GREEDY = {"temperature": 0.0}


def make_state(*params: SamplingParams, prompt: list[int] | None = None) -> SamplingState:
    """A state whose row i has the i-th parameters; all share a prompt."""
    state = SamplingState(VOCAB_SIZE, torch.device("cpu"))
    prompt = prompt or [1, 2, 3]
    for row, row_params in enumerate(params):
        state.add(row, row_params, prompt, len(prompt), EOS, row_params.seed or 0)
    return state


def sample(state: SamplingState, logits: torch.Tensor, rows: list[int] | None = None) -> SampledTokens:
    rows = list(range(logits.shape[0])) if rows is None else rows
    return Sampler().sample(logits, state.batch(rows))


def random_logits(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def ramp(num_rows: int = 1) -> torch.Tensor:
    """Logits 0, 1, ... 39: the likeliest token is 39, then 38, ..."""
    return torch.arange(VOCAB_SIZE).float().repeat(num_rows, 1)


def test_greedy_rows_ask_for_nothing():
    state = make_state(*[SamplingParams(**GREEDY)] * 3, SamplingParams(top_k=1), SamplingParams(temperature=1e-9))
    batch = state.batch([0, 1, 2, 3, 4])
    assert (batch.num_rows, batch.random, batch.has_edits, batch.logprobs) == (5, None, False, None)
    assert state.batch([0, 1, 2, 3, 4]) is batch
    logits = random_logits(5)
    result = Sampler().sample(logits, batch)
    assert result == SampledTokens(logits.argmax(-1).tolist(), [None] * 5, {})


def test_an_empty_batch():
    assert sample(make_state(), torch.zeros(0, VOCAB_SIZE)) == SampledTokens([], [], {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_left_alone_in_any_dtype(dtype):
    params = [
        SamplingParams(**GREEDY),
        SamplingParams(seed=1, top_k=5, top_p=0.9, min_p=0.01),
        SamplingParams(seed=2, logit_bias={3: 5.0}, presence_penalty=1.0, min_tokens=2),
    ]
    logits = random_logits(6).to(dtype)[::2]
    before = logits.clone()
    result = sample(make_state(*params), logits)
    assert torch.equal(logits, before)
    assert all(0 <= token_id < VOCAB_SIZE for token_id in result.token_ids)
    assert result.errors == {}


def test_logits_that_do_not_fit_the_batch():
    with pytest.raises(ShapeError, match=r"logits must be \[1, V\], got \[2, 40\]"):
        Sampler().sample(random_logits(2), make_state(SamplingParams()).batch([0]))


def test_a_seed_gives_the_same_tokens_in_any_batch_and_after_preemption():
    params = SamplingParams(seed=-5, temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    alone = make_state(params)
    tokens: list[int] = []
    for step in range(12):
        tokens += sample(alone, random_logits(seed=step)).token_ids
        alone.append([0], tokens[-1:])
    assert len(set(tokens)) > 3

    crowd = make_state(SamplingParams(**GREEDY), SamplingParams(seed=9, top_k=3), params)
    for step in range(12):
        if step == 5:  # preempted, resumed in another row
            crowd.remove(2)
            crowd.add(7, params, [1, 2, 3, *tokens[:5]], 3, EOS, -5)
        row = 7 if step >= 5 else 2
        logits = torch.cat((random_logits(seed=step), random_logits(seed=100 + step), ramp()))
        result = sample(crowd, logits, [row, 0, 1])
        assert result.token_ids[0] == tokens[step]
        crowd.append([row, 0, 1], result.token_ids)


# Temperature, filters and edits of 50 rows, and what the first sampler that we released drew for them.
KNOWN_PARAMS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, **edits}
    for temperature in (0.0, 0.3, 1.0, 0.77, 2.5)
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.83, 0.0), (0, 1.0, 0.11), (25, 0.9, 0.03))
    for edits in ({}, {"repetition_penalty": 1.3, "logit_bias": {1: 0.5}})
]
# fmt: off
KNOWN_TOKENS = {
    0: [
        554, 537, 520, 870, 299, 282, 1186, 61, 44, 1502, 288, 2763,
        4034, 139, 4402, 3803, 3260, 3395, 975, 4649, 2535, 793, 1087, 1624,
        3250, 1674, 4574, 595, 244, 4472, 2683, 2056, 356, 339, 135, 1864,
        3834, 1566, 1916, 3374, 1349, 2406, 1287, 1083, 3871, 1404, 548, 1129,
        444, 2456,
    ],
    5: [
        554, 3307, 520, 3640, 299, 3052, 1186, 2831, 44, 4272, 2593, 2702,
        343, 880, 2158, 119, 3225, 812, 4299, 3728, 2694, 1368, 3303, 1257,
        1607, 122, 1026, 4749, 2647, 227, 4663, 4501, 2572, 3663, 544, 4010,
        1223, 4025, 3758, 424, 3735, 4933, 1287, 2191, 334, 2407, 2369, 4388,
        1919, 2269,
    ],
}
# fmt: on


def test_a_seed_gives_the_tokens_that_it_always_gave():
    """Whoever keeps a seed to get the same text again relies on it."""
    num_rows, vocab_size = len(KNOWN_PARAMS), 5003
    state = SamplingState(vocab_size, torch.device("cpu"))
    for row, params in enumerate(KNOWN_PARAMS):
        state.add(row, SamplingParams(seed=77 * row, **params), [0, vocab_size // 2], 2, [], 77 * row)
    for step in range(6):
        counter = torch.arange(num_rows * vocab_size).view(num_rows, vocab_size) + step * 1000003
        logits = (counter * 2654435761 % 1000003).double() / 1000003 * 12
        tokens = sample(state, logits.float(), list(range(num_rows))).token_ids
        assert tokens == KNOWN_TOKENS.get(step, tokens)
        state.append(list(range(num_rows)), tokens)


def test_seeds_and_positions_matter():
    logits = torch.zeros(1, VOCAB_SIZE)
    by_seed = [sample(make_state(SamplingParams(seed=seed)), logits).token_ids[0] for seed in range(50)]
    assert len(set(by_seed)) > 20
    state = make_state(SamplingParams(seed=1))
    by_position = []
    for _ in range(50):
        by_position += sample(state, logits).token_ids
        state.append([0], by_position[-1:])
    assert len(set(by_position)) > 20


def test_a_seed_counts_by_its_bits():
    signed, unsigned = SamplingParams(seed=-1), SamplingParams(seed=2**64 - 1)
    logits = torch.zeros(2, VOCAB_SIZE)
    first, second = sample(make_state(signed, unsigned), logits).token_ids
    assert first == second


def test_logit_bias():
    biased = SamplingParams(**GREEDY, logit_bias={5: 100.0, 6: 99.0, VOCAB_SIZE: 1000.0})
    state = make_state(biased, SamplingParams(**GREEDY), SamplingParams(**GREEDY, logit_bias={39: -100.0}))
    assert sample(state, ramp(3)).token_ids == [5, 39, 38]


def test_no_stop_token_before_min_tokens():
    state = make_state(SamplingParams(**GREEDY, min_tokens=2, stop_token_ids=[37, 1000]), SamplingParams(**GREEDY))
    seen = []
    for _ in range(4):
        seen.append(sample(state, ramp(2)).token_ids)
        state.append([0, 1], seen[-1])
    assert seen == [[36, 39], [36, 39], [39, 39], [39, 39]]


def test_min_tokens_counts_output_of_a_resumed_request():
    state = SamplingState(VOCAB_SIZE, torch.device("cpu"))
    state.add(0, SamplingParams(**GREEDY, min_tokens=2), [1, 2, 3, 36, 36], 3, EOS, 0)
    assert sample(state, ramp()).token_ids == [39]


def test_bad_words():
    words = [[39], [2, 3, 38], [37, 37], [], [1, 1000]]
    state = make_state(SamplingParams(**GREEDY, bad_words_token_ids=words))
    seen = []
    for _ in range(5):
        seen += sample(state, ramp()).token_ids
        state.append([0], seen[-1:])
    # 39 never; 38 not right after the prompt's [2, 3]; later 38 is free.
    assert seen == [37, 38, 38, 38, 38]


def test_a_bad_word_of_several_tokens_may_begin():
    state = make_state(SamplingParams(**GREEDY, bad_words_token_ids=[[39, 39, 39]]))
    seen = []
    for _ in range(6):
        seen += sample(state, ramp()).token_ids
        state.append([0], seen[-1:])
    assert seen == [39, 39, 38, 39, 39, 38]


def test_a_bad_word_longer_than_the_history():
    state = make_state(SamplingParams(**GREEDY, bad_words_token_ids=[[9, 9, 9, 1, 2, 3, 39]]))
    assert sample(state, ramp()).token_ids == [39]


def test_penalties_follow_the_history():
    """Against the formulas on the whole history, with rows that come and go."""
    params = {
        0: SamplingParams(**GREEDY, repetition_penalty=1.3),
        1: SamplingParams(**GREEDY, presence_penalty=0.7, frequency_penalty=0.4),
        2: SamplingParams(**GREEDY),
        3: SamplingParams(**GREEDY, repetition_penalty=0.8, presence_penalty=-0.5, frequency_penalty=0.3),
    }
    prompts = {0: [1, 2, 3], 1: [5], 2: [6, 6], 3: [7, 7, 8, 9]}
    state = SamplingState(VOCAB_SIZE, torch.device("cpu"))
    outputs: dict[int, list[int]] = {row: [] for row in params}
    for row in params:
        state.add(row, params[row], prompts[row], len(prompts[row]), EOS, 0)
    for step in range(40):
        if step % 7 == 3:
            state.remove(3)
            state.add(3, params[3], prompts[3] + outputs[3], len(prompts[3]), EOS, 0)
        rows = [[0, 1, 2, 3], [3, 1], [2, 0, 3]][step % 3]
        logits = random_logits(4, seed=step // 3)[: len(rows)]
        expected = []
        for index, row in enumerate(rows):
            penalized = logits[index].clone()
            for token_id in {*prompts[row], *outputs[row]}:
                value, penalty = penalized[token_id], params[row].repetition_penalty
                penalized[token_id] = value / penalty if value > 0 else value * penalty
            for token_id in set(outputs[row]):
                count = outputs[row].count(token_id)
                penalized[token_id] -= params[row].presence_penalty + params[row].frequency_penalty * count
            expected.append(int(penalized.argmax()))
        assert sample(state, logits, rows).token_ids == expected
        state.append(rows, expected)
        for row, token_id in zip(rows, expected, strict=True):
            outputs[row].append(token_id)


def test_many_penalized_rows_and_long_histories():
    """More rows and more distinct tokens than the table starts with."""
    state = SamplingState(2000, torch.device("cpu"))
    params = SamplingParams(**GREEDY, frequency_penalty=1.0)
    for row in range(20):
        prompt = list(range(1000, 1240 + row))
        state.add(row, params, prompt, len(prompt), [], 0)
    logits = torch.zeros(20, 2000)
    for step in range(30):  # ever new tokens: each one is punished once drawn
        assert sample(state, logits).token_ids == [step] * 20
        state.append(list(range(20)), [step] * 20)


def test_a_freed_row_leaves_nothing_behind():
    penalized = SamplingParams(**GREEDY, frequency_penalty=1.0)
    state = make_state(penalized, prompt=[1])
    state.append([0, 0, 0, 0], [39, 39, 39, 38])
    state.remove(0)
    state.add(0, penalized, [2], 1, EOS, 0)
    state.append([0], [38])
    assert state.batch([0]).penalties.token_ids.tolist() == [[2, 38]]
    assert state.batch([0]).penalties.output_counts.tolist() == [[0, 1]]
    state.remove(0)
    state.add(0, SamplingParams(**GREEDY), [2], 1, EOS, 0)
    assert not state.batch([0]).has_edits


def test_several_tokens_of_a_row_at_once():
    one, other = (make_state(SamplingParams(**GREEDY, frequency_penalty=1.0)) for _ in range(2))
    one.append([0, 0, 0], [39, 39, 38])
    for token_id in (39, 39, 38):
        other.append([0], [token_id])
    assert sample(one, ramp()) == sample(other, ramp())
    assert one.batch([0]).penalties.output_counts[0].tolist() == [0, 0, 0, 2, 2, 1]


def test_tokens_that_the_host_has_not_seen():
    """The state is told of tokens where the sampler left them; penalties and bad words are those of told ids."""
    params = [
        SamplingParams(**GREEDY, frequency_penalty=1.5, repetition_penalty=1.2),
        SamplingParams(seed=4, presence_penalty=0.5, bad_words_token_ids=[[39, 38], [1, 2, 3], [39], [5, 39, 39]]),
        SamplingParams(**GREEDY),
        SamplingParams(seed=5, bad_words_token_ids=[[token_id, token_id] for token_id in range(VOCAB_SIZE)]),
        SamplingParams(**GREEDY, min_tokens=3, stop_token_ids=[37]),
    ]
    told, unseen = make_state(*params), make_state(*params)
    rows, sampler = [3, 0, 4, 1, 2], Sampler()
    for step in range(30):
        if step == 20:
            rows = [0, 3, 1]
        logits = random_logits(len(rows), seed=step) + ramp()
        expected = sampler.sample(logits, told.batch(rows)).token_ids
        told.append(rows[:2], expected[:2])  # other rows than the batch's, so it is gathered anew
        told.append(rows[2:], expected[2:])
        drawn = sampler.launch(logits, unseen.batch(rows))
        unseen.append(rows, drawn.token_ids)
        assert sampler.finish(drawn.map(torch.clone)).token_ids == expected


def test_bad_words_look_back_as_far_as_they_are_long():
    words = [[7, 8, 39], [9, 38], [3, 1, 2, 3, 37]]
    state = make_state(SamplingParams(**GREEDY, bad_words_token_ids=words))
    seen = []
    for token_id in (7, 8, 9, 8, 7):
        seen += sample(state, ramp()).token_ids
        state.append([0], [token_id])
    assert seen == [39, 39, 38, 39, 39]
    resumed = SamplingState(VOCAB_SIZE, torch.device("cpu"))
    resumed.add(0, SamplingParams(**GREEDY, bad_words_token_ids=words), [1, 7, 8], 1, EOS, 0)
    assert sample(resumed, ramp()).token_ids == [38]


def test_a_batch_that_goes_on_gathers_nothing_but_positions():
    state = make_state(SamplingParams(seed=1, top_p=0.9), SamplingParams(seed=2))
    first = state.batch([0, 1])
    state.append([0, 1], torch.tensor([5, 6]))
    second = state.batch([0, 1])
    assert first.random.positions.tolist() == [3, 3]
    assert second.random.positions.tolist() == [4, 4]
    assert second.random.top_p is first.random.top_p
    assert state.batch([1, 0]).random.positions.tolist() == [4, 4]


def test_nan_and_inf_end_only_their_row():
    params = [SamplingParams(seed=1, top_p=0.9, logprobs=1), SamplingParams(**GREEDY), SamplingParams(seed=3, top_k=3)]
    params = params * 2
    clean = random_logits(6)
    clean[:, 3] = -math.inf
    dirty = clean.clone()
    dirty[0, 7], dirty[1] = math.nan, -math.inf
    dirty[2, 7] = math.inf
    state = make_state(*params)
    expected, result = sample(state, clean), sample(state, dirty)
    assert expected.errors == {}
    assert result.token_ids == [-1, -1, -1, *expected.token_ids[3:]]
    assert result.logprobs == [None, None, None, *expected.logprobs[3:]]
    assert list(result.errors) == [0, 1, 2]
    assert all("NaN or infinite logits" in message for message in result.errors.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_is_an_error_of_its_own(temperature):
    everything = [[token_id] for token_id in range(VOCAB_SIZE)]
    state = make_state(
        SamplingParams(temperature=temperature, bad_words_token_ids=everything), SamplingParams(**GREEDY)
    )
    result = sample(state, ramp(2))
    assert result.token_ids == [-1, 39]
    assert list(result.errors) == [0]
    assert "no token is left" in result.errors[0]
    logits = ramp(2)
    logits[0, 0] = math.nan
    assert "NaN" in sample(state, logits).errors[0]


def test_logprobs_are_of_the_raw_logits():
    params = [
        SamplingParams(**GREEDY, logprobs=2, logit_bias={4: 1000.0}),
        SamplingParams(**GREEDY),
        SamplingParams(temperature=2.0, top_k=1, logprobs=0),
        SamplingParams(**GREEDY, logprobs=VOCAB_SIZE + 5),
    ]
    result = sample(make_state(*params), ramp(4))
    expected = ramp()[0].log_softmax(-1)
    first, nothing, last, everything = result.logprobs
    assert result.token_ids == [4, 39, 39, 39]
    assert (first.token_ids, first.ranks) == ([4, 39, 38], [36, 1, 2])
    assert first.logprobs == pytest.approx(expected[[4, 39, 38]].tolist())
    assert nothing is None
    assert (last.token_ids, last.ranks) == ([39], [1])
    assert everything.token_ids == [39, *range(39, -1, -1)]
    assert everything.ranks == [1, *range(1, 41)]


def test_prompt_logprobs():
    logits = random_logits(3)
    entries = prompt_logprobs(logits, [5, 6, 7], 4)
    assert entries == prompt_logprobs(logits, torch.tensor([5, 6, 7]), 4)
    expected = logits.log_softmax(-1)
    for position, (entry, token_id) in enumerate(zip(entries, [5, 6, 7], strict=True)):
        best = expected[position].topk(4)
        assert entry.token_ids == [token_id, *best.indices.tolist()]
        assert entry.logprobs == pytest.approx([expected[position, token_id].item(), *best.values.tolist()])
        assert entry.ranks == [1 + int((expected[position] > expected[position, token_id]).sum()), 1, 2, 3, 4]
    assert prompt_logprobs(logits[:0], [], 4) == []
    assert top_logprobs(logits[:0], torch.zeros(0).long(), []) == []


def test_rows_are_taken_and_freed():
    state = make_state(SamplingParams())
    with pytest.raises(ValueError, match="row 0 is taken"):
        state.add(0, SamplingParams(), [1], 1, EOS, 0)
    with pytest.raises(ValueError, match="token_ids is empty"):
        state.add(1, SamplingParams(), [], 0, EOS, 0)
    state.remove(0)
    with pytest.raises(KeyError):
        state.remove(0)
    with pytest.raises(KeyError):
        state.batch([0])
    state.add(0, SamplingParams(**GREEDY), [1], 1, EOS, 0)
    assert state.batch([0]).random is None


def test_none_for_what_no_row_asks():
    random = make_state(SamplingParams(seed=1), SamplingParams(seed=2, top_k=VOCAB_SIZE)).batch([0, 1]).random
    assert not random.has_filters
    assert random.seeds.tolist() == [1, 2]
    assert random.positions.tolist() == [3, 3]
    mixed = make_state(SamplingParams(**GREEDY), SamplingParams(seed=2, top_k=-1), SamplingParams(seed=3, top_k=4))
    random = mixed.batch([2, 0, 1]).random
    assert (random.temperature.tolist(), random.top_k.tolist()) == ([1, 0, 1], [4, 0, 0])
    assert random.has_filters


def test_what_kernels_read_lies_side_by_side() -> None:
    """They take addresses, not strides: a view of another layout would give a row its neighbour's numbers."""
    random = SamplingParams(temperature=0.8, seed=3, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
    batch = make_state(SamplingParams(temperature=0.0), random, random).batch([0, 1, 2])
    assert batch.random is not None
    assert batch.penalties is not None
    for rows in (batch.random, batch.penalties):
        tensors = [getattr(rows, name) for name in type(rows).__dataclass_fields__]
        assert all(tensor.is_contiguous() for tensor in tensors if isinstance(tensor, torch.Tensor))
