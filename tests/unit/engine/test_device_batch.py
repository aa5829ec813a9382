# SPDX-License-Identifier: Apache-2.0
"""A device's rows against the CPU's, which know every token: the same steps through both."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker.device_batch import DeviceBatch, StepNumbers, StepShape
from wavetrain_engine.worker.input_batch import InputBatch, StepInputs

CPU = torch.device("cpu")
MAX_NUM_SEQS, MAX_MODEL_LEN = 5, 29
STATIC = StepShape(num_tokens=16, num_rows=8)


def make_batch(block_size: int = 4) -> DeviceBatch:
    return DeviceBatch(
        max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, block_size=block_size, static_shape=STATIC, device=CPU
    )


def admitted(request_id: str, token_ids: list[int], block_ids: list[int]) -> AdmittedRequest:
    return AdmittedRequest(request_id, token_ids, len(token_ids), SamplingParams(), block_ids, 0)


@dataclass
class Twins:
    """Both batches, told the same; and of each request how many tokens it has, has computed, and has blocks for."""

    block_size: int
    rng: random.Random
    live: dict[str, list[int]] = field(default_factory=dict)
    num_made: int = 0

    def __post_init__(self) -> None:
        self.device = make_batch(self.block_size)
        self.host = InputBatch(max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, block_size=self.block_size)

    def add(self) -> None:
        num_tokens = self.rng.randint(1, MAX_MODEL_LEN - 1)
        num_blocks = self.rng.randint(0, 1)
        request = admitted(
            f"r{self.num_made}",
            [self.rng.randint(0, 999) for _ in range(num_tokens)],
            [self.rng.randint(0, 99) for _ in range(num_blocks)],
        )
        self.num_made += 1
        self.live[request.request_id] = [num_tokens, 0, num_blocks]
        assert self.device.add(request).row == self.host.add(request).row

    def remove(self) -> None:
        request_id = self.rng.choice(sorted(self.live))
        del self.live[request_id]
        self.device.remove(request_id)
        self.host.remove(request_id)

    def schedule(self, request_id: str, count: int) -> ScheduledRequest:
        num_tokens, num_computed, num_blocks = self.live[request_id]
        count = min(count, num_tokens - num_computed)
        end = num_computed + count
        new = [self.rng.randint(0, 99) for _ in range(-(-end // self.block_size) - num_blocks)]
        is_sampling = end == num_tokens and end < MAX_MODEL_LEN
        self.live[request_id] = [num_tokens + is_sampling, end, num_blocks + len(new)]
        return ScheduledRequest(request_id, num_computed, count, new, is_sampling)

    def step(self, *, is_decode: bool) -> None:
        able = [name for name, (tokens, computed, _) in self.live.items() if tokens - computed >= 1]
        names = self.rng.sample(able, self.rng.randint(0, len(able)))
        scheduled = [self.schedule(name, 1 if is_decode else self.rng.randint(1, 9)) for name in names]
        expected, inputs = self.host.inputs(scheduled), self.device.inputs(scheduled)
        sampling = [index for index, item in enumerate(scheduled) if item.is_sampling]
        shape = StepShape(len(inputs.positions), len(inputs.rows))
        is_static = is_decode and self.device.fits_static(StepShape(8, 8))
        numbers = self.device.send(inputs, sampling, StepShape(8, 8) if is_static else shape, is_static=is_static)
        self.compare(numbers, expected, sampling)
        tokens = [self.rng.randint(0, 999) for _ in sampling]
        self.host.append_tokens(expected.rows[sampling], np.asarray(tokens, dtype=np.int64))
        if sampling:
            self.device.append_on_device(numbers, torch.tensor(tokens))

    def compare(self, numbers: StepNumbers, expected: StepInputs, sampling: list[int]) -> None:
        token_ids, block_tables = self.device.gather(numbers)
        num_tokens, num_rows = len(expected.token_ids), len(expected.rows)
        assert token_ids[:num_tokens].tolist() == expected.token_ids.tolist()
        assert numbers.positions[:num_tokens].tolist() == expected.positions.tolist()
        assert numbers.slot_mapping[:num_tokens].tolist() == expected.slot_mapping.tolist()
        assert numbers.query_start_loc[: num_rows + 1].tolist() == expected.query_start_loc.tolist()
        assert numbers.seq_lens[:num_rows].tolist() == expected.seq_lens.tolist()
        for row, seq_len in enumerate(expected.seq_lens):
            used = -(-int(seq_len) // self.block_size)
            assert block_tables[row, :used].tolist() == expected.block_tables[row, :used].tolist()
        ends = (expected.query_start_loc[1:] - 1)[sampling].tolist()
        assert numbers.sampling_tokens[: len(sampling)].tolist() == ends
        # Padding: no slot, no context, as many tokens as everybody.
        assert set(numbers.slot_mapping[num_tokens:].tolist()) <= {-1}
        assert set(numbers.seq_lens[num_rows:].tolist()) <= {0}
        assert set(numbers.positions[num_tokens:].tolist()) | set(numbers.rows[num_rows:].tolist()) <= {0}
        assert set(numbers.query_start_loc[num_rows:].diff().tolist()) <= {1}


@settings(max_examples=60, deadline=None)
@given(block_size=st.sampled_from([1, 3, 4, 16]), seed=st.integers(0, 2**32))
def test_a_device_has_what_the_host_has(block_size: int, seed: int) -> None:
    twins = Twins(block_size, random.Random(seed))
    for _ in range(40):
        action = twins.rng.random()
        if action < 0.25 and len(twins.live) < MAX_NUM_SEQS:
            twins.add()
        elif action < 0.35 and twins.live:
            twins.remove()
        else:
            twins.step(is_decode=action < 0.7)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
def test_every_part_begins_where_kernels_expect_it(num_tokens: int, num_rows: int) -> None:
    shape = StepShape(num_tokens, num_rows)
    words = np.full(StepNumbers.num_words(shape), -7, dtype=np.int64)
    numbers = StepNumbers.lay_out(words, shape, np.int32)
    parts = [getattr(numbers, name) for name in StepNumbers.__dataclass_fields__]
    assert [len(part) for part in parts] == [num_tokens] * 3 + [num_rows] * 3 + [num_rows + 1, num_rows]
    for index, part in enumerate(parts):
        assert (part.ctypes.data - words.ctypes.data) % 16 == 0
        part[:] = index
    assert [set(part.tolist()) for part in parts] == [{index} for index in range(8)]  # none lies on another


def test_static_numbers_stay_where_they_are() -> None:
    batch = make_batch()
    shape = StepShape(4, 4)
    before = [part.data_ptr() for part in (batch.static_numbers(shape).positions, batch.static_numbers(shape).seq_lens)]
    batch.add(admitted("a", [1, 2, 3], [5]))
    inputs = batch.inputs([ScheduledRequest("a", 2, 1, (), True)])
    numbers = batch.send(inputs, [0], shape, is_static=True)
    assert [numbers.positions.data_ptr(), numbers.seq_lens.data_ptr()] == before
    assert numbers.positions.tolist() == [2, 0, 0, 0]


def test_a_step_with_too_much_that_is_new_is_not_static() -> None:
    batch = DeviceBatch(max_num_seqs=2, max_model_len=8000, block_size=16, static_shape=STATIC, device=CPU)
    assert batch.fits_static(STATIC)
    batch.add(admitted("long", list(range(7000)), [3]))
    assert not batch.fits_static(STATIC)
    inputs = batch.inputs([ScheduledRequest("long", 6999, 1, (), True)])
    numbers = batch.send(inputs, [0], StepShape(1, 1), is_static=False)
    assert batch.gather(numbers)[0].tolist() == [6999]
    assert batch.fits_static(STATIC)


def test_verification_is_padded_with_rows_of_as_many_tokens() -> None:
    batch = make_batch()
    for name in "ab":
        batch.add(admitted(name, [1, 2, 3, 4, 5, 6], [1, 2]))
    inputs = batch.inputs([ScheduledRequest(name, 2, 4, (), True) for name in "ab"])
    numbers = batch.send(inputs, [0, 1], StepShape(16, 4), is_static=True)
    assert numbers.query_start_loc.tolist() == [0, 4, 8, 12, 16]
    assert numbers.seq_lens.tolist() == [6, 6, 0, 0]
    assert numbers.slot_mapping.tolist()[8:] == [-1] * 8
