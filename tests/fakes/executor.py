# SPDX-License-Identifier: Apache-2.0
"""A deterministic Executor without tensors, which distrusts every plan it gets.

The "KV" of a token is a number that depends on the token and all tokens before it, kept per slot. So a plan
that reads a slot with anything else in it than the row's own prefix is caught where it happens, as are
spans with gaps, tables too short or too long, and writes into blocks that another live request holds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from wavetrain_engine.plan import AdmittedRequest, PendingResult, ScheduledRequest, StepPlan, StepResult
from wavetrain_engine.request import FinishReason, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams

_ROOT = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(state: int, value: int) -> int:
    state = ((state ^ (value + 0x1000)) * 0xD6E8FEB86659FD93) & _MASK
    return state ^ (state >> 32)


def sample(
    prefix_content: int, params: SamplingParams, num_output_tokens: int, vocab_size: int, eos: Collection[int]
) -> int:
    """The token after a prefix: a hash of it and the seed; end tokens are masked before min_tokens."""
    seed = 0 if params.is_greedy or params.seed is None else params.seed + 1
    token_id = _mix(prefix_content, seed) % vocab_size
    masked = {*params.stop_token_ids, *eos} if num_output_tokens < params.min_tokens else ()
    while token_id in masked:
        token_id = (token_id + 1) % vocab_size
    return token_id


def sequential_output(
    prompt: list[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    eos: Collection[int] = (),
    nan_token_id: int | None = None,
) -> tuple[list[int], FinishReason]:
    """What FakeExecutor generates for a request that is alone in the world: (output, finish reason)."""
    content = _ROOT
    for token_id in prompt:
        content = _mix(content, token_id)
    output: list[int] = []
    room = max_model_len - len(prompt)
    limit = room if params.max_tokens is None else min(params.max_tokens, room)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    while True:
        if nan_token_id in prompt or nan_token_id in output:
            return output, FinishReason.ERROR
        token_id = sample(content, params, len(output), vocab_size, eos)
        output.append(token_id)
        content = _mix(content, token_id)
        if token_id in ends and len(output) >= params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == limit:
            return output, FinishReason.LENGTH


class _Row:
    """A request as the executor remembers it. It keeps and grows the plan's own list of tokens, as it may."""

    def __init__(self, admitted: AdmittedRequest) -> None:
        self.admitted = admitted
        self.tokens = admitted.token_ids
        self.contents: list[int] = []  # KV by position
        self.block_ids: list[int] = []
        self.num_computed_tokens = admitted.num_computed_tokens
        self.num_good_tokens = admitted.num_computed_tokens  # those that finite logits have seen
        for token_id in self.tokens:
            self._extend(token_id)

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self._extend(token_id)

    def _extend(self, token_id: int) -> None:
        self.contents.append(_mix(self.contents[-1] if self.contents else _ROOT, token_id))


class _Pending(PendingResult):
    def __init__(self, executor: FakeExecutor, plan: StepPlan) -> None:
        self._executor = executor
        self._plan = plan

    def result(self) -> StepResult:
        return self._executor.run(self._plan)


class FakeExecutor:
    """Runs plans lazily, at `result()`, so a plan that changes after `submit` is caught too.

    Args:
        nan_token_id: rows that sample with this token among theirs have "NaN logits".
        fails_at_step: this step raises RuntimeError.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos: Collection[int] = (),
        nan_token_id: int | None = None,
        fails_at_step: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos = eos
        self.nan_token_id = nan_token_id
        self.fails_at_step = fails_at_step
        self.is_checking_reads = True  # takes the square of the length; long traces do without
        self.plans: list[StepPlan] = []
        self.num_shutdowns = 0
        self._queue: list[StepPlan] = []
        self._rows: dict[str, _Row] = {}
        self._holders: dict[int, set[str]] = {}
        self._slots: dict[int, int] = {}
        self._bad_slots: dict[int, _Row] = {}  # slot to the failed row that wrote it

    @property
    def num_rows(self) -> int:
        """Requests it remembers."""
        return len(self._rows)

    @property
    def num_queued(self) -> int:
        """Steps submitted and not run."""
        return len(self._queue)

    def submit(self, plan: StepPlan) -> PendingResult:
        self.plans.append(plan)
        self._queue.append(plan)
        return _Pending(self, plan)

    def shutdown(self) -> None:
        self.num_shutdowns += 1

    def run(self, plan: StepPlan) -> StepResult:
        assert self._queue[0] is plan, "results are collected in the order of submission"
        self._queue.pop(0)
        if plan.step_id == self.fails_at_step:
            raise RuntimeError("the device is gone")
        self._apply(plan)
        assert plan.scheduled, "an empty step"
        assert plan.num_tokens <= self.max_num_batched_tokens, "over the token budget"
        ids = [row.request_id for row in plan.scheduled]
        assert len(set(ids)) == len(ids), "two rows of one request"
        for scheduled in plan.scheduled:
            self._write(scheduled)
        result = StepResult([], [], [])
        for index, scheduled in enumerate(plan.scheduled):  # all writes of a step come before all reads
            self._read(index, scheduled, result)
        return result

    def _apply(self, plan: StepPlan) -> None:
        for request_id in plan.removed:
            row = self._rows.pop(request_id)
            for block_id in row.block_ids:
                self._holders[block_id].discard(request_id)
        for admitted in plan.admitted:
            assert admitted.request_id not in self._rows, "admitted twice"
            row = _Row(admitted)
            assert admitted.num_computed_tokens < len(admitted.token_ids), "nothing left to compute"
            self._rows[admitted.request_id] = row
            self._hold(row, admitted.block_ids)
        assert len(self._rows) <= self.max_num_seqs, "more rows than seats"

    def _hold(self, row: _Row, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            assert 0 <= block_id < self.num_blocks
            assert block_id not in row.block_ids, "a block twice in one table"
            row.block_ids.append(block_id)
            self._holders.setdefault(block_id, set()).add(row.admitted.request_id)

    def _slot(self, row: _Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _write(self, scheduled: ScheduledRequest) -> None:
        row = self._rows[scheduled.request_id]
        self._hold(row, scheduled.new_block_ids)
        start, end = scheduled.num_computed_tokens, scheduled.num_computed_tokens + scheduled.num_scheduled_tokens
        assert scheduled.num_scheduled_tokens > 0
        assert start == row.num_computed_tokens, "a gap or an overlap between spans"
        assert end <= len(row.tokens), "a span beyond the last token"
        assert len(row.block_ids) == -(-end // self.block_size), "table too short, or allocated ahead of need"
        assert scheduled.is_sampling == (end == len(row.tokens))
        for position in range(start, end):
            slot = self._slot(row, position)
            holders = self._holders[slot // self.block_size]
            assert holders == {scheduled.request_id}, f"a write into a block that {holders} hold"
            self._slots[slot] = row.contents[position]
            self._bad_slots.pop(slot, None)
        row.num_computed_tokens = end

    def _read(self, index: int, scheduled: ScheduledRequest, result: StepResult) -> None:
        row, params = self._rows[scheduled.request_id], self._rows[scheduled.request_id].admitted.sampling_params
        start, end = scheduled.num_computed_tokens, row.num_computed_tokens
        for position in range(end if self.is_checking_reads else 0):
            slot = self._slot(row, position)
            assert self._slots.get(slot) == row.contents[position], "a slot holds another prefix than the row's"
            assert self._bad_slots.get(slot, row) is row, "a failed request's KV is read"
        num_prompt = row.admitted.num_prompt_tokens
        wants_prompt = params.prompt_logprobs is not None
        positions = range(start + 1, min(end + 1, num_prompt))
        result.prompt_logprobs.append([_entry(row, position) for position in positions] if wants_prompt else None)
        result.sampled_token_ids.append([])
        result.logprobs.append(None)
        if not scheduled.is_sampling:
            return
        if self.nan_token_id in row.tokens:
            # Whatever was written since logits were last finite must never be read by another.
            self._bad_slots |= {self._slot(row, position): row for position in range(row.num_good_tokens, end)}
            result.errors[index] = "the logits are not finite"
            row.append(0)  # a step in flight behind this one computes a token here, whatever it is
            return
        row.num_good_tokens = end
        row.append(sample(row.contents[-1], params, len(row.tokens) - num_prompt, self.vocab_size, self.eos))
        result.sampled_token_ids[index] = row.tokens[-1:]
        if params.logprobs is not None:
            result.logprobs[index] = [_entry(row, len(row.tokens) - 1)]


def _entry(row: _Row, position: int) -> TokenLogprobs:
    return TokenLogprobs([row.tokens[position]], [-float(position)], [1])
