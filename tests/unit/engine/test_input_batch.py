# SPDX-License-Identifier: Apache-2.0
"""The worker's rows against a plain model of them: dictionaries of lists, one token at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker.input_batch import InputBatch, StepInputs

MAX_NUM_SEQS = 4
MAX_MODEL_LEN = 23


@dataclass
class Plain:
    """One request as anybody would write it down."""

    token_ids: list[int]
    block_ids: list[int]
    num_prompt_tokens: int
    num_cached_blocks: int
    num_computed_tokens: int = 0


@dataclass
class Rows:
    """An InputBatch and the model of it, moved together."""

    block_size: int
    rng: random.Random
    plain: dict[str, Plain] = field(default_factory=dict)
    num_made: int = 0

    def __post_init__(self) -> None:
        self.batch = InputBatch(max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, block_size=self.block_size)
        self.next_block = 1

    def new_blocks(self, count: int) -> list[int]:
        ids = list(range(self.next_block, self.next_block + count))
        self.next_block += count
        self.rng.shuffle(ids)
        return ids

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def add(self) -> None:
        num_tokens = self.rng.randint(1, MAX_MODEL_LEN)
        num_prompt_tokens = self.rng.randint(1, num_tokens)
        num_cached_blocks = self.rng.randint(0, (num_tokens - 1) // self.block_size)
        token_ids = [self.rng.randint(0, 999) for _ in range(num_tokens)]
        request_id = f"r{self.num_made}"
        self.num_made += 1
        block_ids = self.new_blocks(self.num_blocks_for(num_cached_blocks * self.block_size + 1))
        request = Plain(token_ids, block_ids, num_prompt_tokens, num_cached_blocks)
        request.num_computed_tokens = num_cached_blocks * self.block_size
        self.plain[request_id] = request
        entry = self.batch.add(
            AdmittedRequest(
                request_id=request_id,
                token_ids=list(token_ids),
                num_prompt_tokens=num_prompt_tokens,
                sampling_params=SamplingParams(),
                block_ids=list(block_ids),
                num_computed_tokens=request.num_computed_tokens,
            )
        )
        assert self.batch[request_id] is entry
        assert entry.num_prompt_tokens == num_prompt_tokens

    def remove(self) -> None:
        request_id = self.rng.choice(sorted(self.plain))
        del self.plain[request_id]
        assert self.batch.remove(request_id) is not None
        assert self.batch.remove(request_id) is None
        assert request_id not in self.batch

    def step(self) -> None:
        """Computes random spans of some requests, in random order; whose span reaches the end samples."""
        request_ids = self.rng.sample(sorted(self.plain), self.rng.randint(0, len(self.plain)))
        scheduled: list[ScheduledRequest] = []
        for request_id in request_ids:
            left = self.num_left(request_id)
            if left:
                scheduled.append(self.schedule(request_id, self.rng.randint(1, left)))
        self.run(scheduled)

    def decode(self) -> None:
        """Computes the last token of everybody whose rest is computed, in one order, several times."""
        request_ids = [name for name in self.plain if self.num_left(name) == 1]
        for _ in range(self.rng.randint(1, 2 * self.block_size)):
            request_ids = [name for name in request_ids if len(self.plain[name].token_ids) < MAX_MODEL_LEN]
            self.run([self.schedule(name, 1) for name in request_ids])

    def num_left(self, request_id: str) -> int:
        request = self.plain[request_id]
        return len(request.token_ids) - request.num_computed_tokens

    def schedule(self, request_id: str, count: int) -> ScheduledRequest:
        request = self.plain[request_id]
        end = request.num_computed_tokens + count
        new = self.new_blocks(max(0, self.num_blocks_for(end) - len(request.block_ids)))
        request.block_ids += new
        is_sampling = end == len(request.token_ids) and end < MAX_MODEL_LEN
        return ScheduledRequest(request_id, request.num_computed_tokens, count, new, is_sampling)

    def run(self, scheduled: list[ScheduledRequest]) -> None:
        inputs = self.batch.inputs(scheduled)
        self.compare(scheduled, inputs)
        sampling = [index for index, item in enumerate(scheduled) if item.is_sampling]
        sampled = np.asarray([self.rng.randint(0, 999) for _ in sampling], dtype=np.int64)
        self.batch.append_tokens(inputs.rows[sampling], sampled)
        for item in scheduled:
            self.plain[item.request_id].num_computed_tokens += item.num_scheduled_tokens
        for index, token_id in zip(sampling, sampled.tolist(), strict=True):
            self.plain[scheduled[index].request_id].token_ids.append(token_id)

    def compare(self, scheduled: list[ScheduledRequest], inputs: StepInputs) -> None:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        seq_lens = [item.num_computed_tokens + item.num_scheduled_tokens for item in scheduled]
        width = inputs.block_tables.shape[1]
        tables: list[list[int]] = []
        for item, seq_len in zip(scheduled, seq_lens, strict=True):
            request = self.plain[item.request_id]
            for position in range(item.num_computed_tokens, seq_len):
                token_ids.append(request.token_ids[position])
                positions.append(position)
                block, offset = divmod(position, self.block_size)
                slots.append(request.block_ids[block] * self.block_size + offset)
            starts.append(len(token_ids))
            used = request.block_ids[: self.num_blocks_for(seq_len)]
            tables.append(used + [0] * (width - len(used)))
        assert inputs.token_ids.tolist() == token_ids
        assert inputs.positions.tolist() == positions
        assert inputs.slot_mapping.tolist() == slots
        assert inputs.query_start_loc.tolist() == starts
        assert inputs.seq_lens.tolist() == seq_lens
        assert inputs.block_tables.tolist() == tables
        assert inputs.max_query_len == max((item.num_scheduled_tokens for item in scheduled), default=0)
        assert inputs.max_seq_len == max(seq_lens, default=0)
        assert inputs.rows.tolist() == [self.batch[item.request_id].row for item in scheduled]
        assert {inputs.token_ids.dtype, inputs.positions.dtype, inputs.slot_mapping.dtype} == {np.dtype(np.int64)}
        assert {inputs.query_start_loc.dtype, inputs.seq_lens.dtype, inputs.block_tables.dtype} == {np.dtype(np.int32)}

    def check(self) -> None:
        assert len(self.batch) == len(self.plain)
        rows = [self.batch[request_id].row for request_id in self.plain]
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < MAX_NUM_SEQS for row in rows)
        for request_id, request in self.plain.items():
            row, length = self.batch[request_id].row, len(request.token_ids)
            start = self.rng.randint(0, length - 1)
            end = self.rng.randint(start, length - 1)
            assert self.batch.prompt_targets(row, start, end).tolist() == request.token_ids[start + 1 : end + 1]


@settings(max_examples=60, deadline=None)
@given(block_size=st.sampled_from([1, 3, 4, 16, 64]), seed=st.integers(0, 2**32))
def test_rows_are_what_a_plain_model_says(block_size: int, seed: int) -> None:
    rows = Rows(block_size, random.Random(seed))
    for _ in range(40):
        action = rows.rng.random()
        if action < 0.25 and len(rows.plain) < MAX_NUM_SEQS:
            rows.add()
        elif action < 0.4 and rows.plain:
            rows.remove()
        elif action < 0.7:
            rows.step()
        else:
            rows.decode()
        rows.check()


def make_batch() -> InputBatch:
    return InputBatch(max_num_seqs=2, max_model_len=16, block_size=4)


def admitted(request_id: str, token_ids: list[int], block_ids: list[int]) -> AdmittedRequest:
    return AdmittedRequest(request_id, token_ids, len(token_ids), SamplingParams(), block_ids, 0)


def test_a_reused_row_shows_nothing_of_its_last_owner() -> None:
    batch = make_batch()
    batch.add(admitted("old", list(range(100, 116)), [9, 8, 7, 6]))
    row = batch["old"].row
    batch.remove("old")
    batch.add(admitted("new", [1, 2], [3]))
    batch.add(admitted("long", list(range(12)), [1, 2, 4]))
    assert batch["new"].row == row
    inputs = batch.inputs([ScheduledRequest("new", 0, 2, [], True), ScheduledRequest("long", 0, 12, [], True)])
    assert inputs.block_tables.tolist() == [[3, 0, 0, 0], [1, 2, 4, 0]]


def test_an_empty_step_has_empty_inputs() -> None:
    inputs = make_batch().inputs([])
    assert inputs.query_start_loc.tolist() == [0]
    assert inputs.token_ids.shape == inputs.seq_lens.shape == (0,)


def decode(batch: InputBatch, step: int, *request_ids: str) -> StepInputs:
    """A token for each of requests that were admitted with four tokens and one block."""
    new_block_ids = [10 * step, 10 * step + 1] if step % 4 == 0 else []
    rows = [
        ScheduledRequest(request_id, 4 + step, 1, new_block_ids[index : index + 1], True)
        for index, request_id in enumerate(request_ids)
    ]
    inputs = batch.inputs(rows)
    batch.append_tokens(inputs.rows, np.full(len(rows), 100 + step, dtype=np.int64))
    return inputs


def test_requests_that_decode_on_have_their_arrays_moved_on() -> None:
    batch = make_batch()
    for index, name in enumerate("ab"):
        batch.add(admitted(name, [1, 2, 3, 4, 5], [index + 1]))
    first = decode(batch, 0, "a", "b")
    arrays = (first.token_ids, first.positions, first.slot_mapping, first.seq_lens, first.block_tables)
    for step in range(1, 9):
        assert decode(batch, step, "a", "b") is first
    assert arrays == (first.token_ids, first.positions, first.slot_mapping, first.seq_lens, first.block_tables)
    assert first.block_tables.tolist() == [[1, 0, 40, 80], [2, 1, 41, 81]]
    assert (first.token_ids.tolist(), first.slot_mapping.tolist()) == ([107, 107], [320, 324])


def test_arrays_are_made_anew_for_other_rows() -> None:
    batch = make_batch()
    for index, name in enumerate("ab"):
        batch.add(admitted(name, [1, 2, 3, 4, 5], [index + 1]))
    both = decode(batch, 0, "a", "b")
    one = decode(batch, 1, "b")
    assert one is not both
    batch.remove("a")
    assert decode(batch, 2, "b") is not one
