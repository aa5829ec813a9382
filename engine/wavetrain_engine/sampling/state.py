# SPDX-License-Identifier: Apache-2.0
"""What the sampler must know of every running request, kept from step to step by the worker's row numbers.

A row is added when its request is admitted (or resumed: its output so far is part of `token_ids`), told of each token
that it gains, and removed when the request leaves. `batch` then gathers the rows of a step. It needs no token of the
step before: tokens go from the sampler to `append` on the device. What only changes when other rows are asked for is
kept between steps, so a steady batch costs next to nothing on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wavetrain_engine.sampling.bad_words import BadWords
from wavetrain_engine.sampling.batch import LogprobRows, PenaltyRows, RandomRows, SamplingBatch, TokenEdits
from wavetrain_engine.sampling.row_parameters import RowParameters
from wavetrain_engine.sampling.token_table import TokenTable
from wavetrain_engine.sampling.upload import upload, upload_ints
from wavetrain_engine.sampling_params import SamplingParams


@dataclass(slots=True)
class _Row:
    """One request that asks for more than its likeliest token.

    Attributes:
        num_tokens: prompt and output tokens: the position of the next one.
        min_num_tokens: prompt and min_tokens; before that, `stop_ids` are forbidden.
        bad_tokens: forbidden always.
        bad_words: forbidden sequences of two tokens or more.
    """

    params: SamplingParams
    num_tokens: int
    min_num_tokens: int
    stop_ids: list[int]
    bad_tokens: list[int]
    bad_words: list[list[int]]


@dataclass(slots=True)
class _Steady:
    """What is kept of the last batch while its rows are asked for again.

    Attributes:
        rows: the worker's.
        batch: without what changes from step to step.
        asking: index in `rows` and state of those that ask for something.
        num_tokens: [N] int64, of each row; on the device. None where no row asks.
        looking: [P] int64 index in `rows` of those in the token table, with their slots; None where there are none.
        penalized: [P] int64 slots of the penalized rows.
        longest: most tokens of a row in the token table.
        num_appended: tokens that each row has gained since `asking` was counted.
        valid_for: how many more may be gained before some row's min_tokens are reached.
    """

    rows: list[int]
    batch: SamplingBatch
    asking: list[tuple[int, _Row]]
    num_tokens: Tensor | None = None
    looking: tuple[Tensor, Tensor] | None = None
    penalized: Tensor | None = None
    bad_words: BadWords | None = None
    longest: int = 0
    num_appended: int = 0
    valid_for: int | None = None


class SamplingState:
    """The sampling side of the worker's rows. Not thread-safe; the worker's thread owns it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[int, _Row | None] = {}  # None: takes its likeliest token, and that is all
        self._asking: set[int] = set()  # the others
        self._parameters = RowParameters(vocab_size)
        self._table = TokenTable(vocab_size, device)
        self._steady: _Steady | None = None

    def add(
        self,
        row: int,
        params: SamplingParams,
        token_ids: list[int],
        num_prompt_tokens: int,
        eos_token_ids: list[int],
        seed: int,
    ) -> None:
        """Takes over a free row; `token_ids` are the request's prompt and its output so far.

        Args:
            seed: `params.seed`, or one drawn by the caller where that is None. For tokens that do not change when
                the request is preempted and resumed, it must be the same both times.

        Raises:
            ValueError: the row is taken, or `token_ids` is empty.
        """
        if not token_ids:
            raise ValueError("token_ids is empty; a request has at least one prompt token")
        if row in self._rows:
            raise ValueError(f"row {row} is taken; remove it first")
        self._forget_steady()
        is_greedy = self._parameters.set(row, params, seed)
        bad_words = [words for words in params.bad_words_token_ids if words and words[-1] < self._vocab_size]
        has_penalties = self._parameters.has_penalties(row)
        asks = not is_greedy or has_penalties or bad_words or params.logit_bias or params.min_tokens
        if not asks and params.logprobs is None:
            self._rows[row] = None
            return
        stop_ids = {*eos_token_ids, *params.stop_token_ids} if params.min_tokens else set[int]()
        self._asking.add(row)
        self._rows[row] = state = _Row(
            params=params,
            num_tokens=len(token_ids),
            min_num_tokens=num_prompt_tokens + params.min_tokens,
            stop_ids=sorted(token_id for token_id in stop_ids if token_id < self._vocab_size),
            bad_tokens=sorted({words[0] for words in bad_words if len(words) == 1}),
            bad_words=[words for words in bad_words if len(words) > 1],
        )
        if has_penalties or state.bad_words:
            self._table.add(row, token_ids, num_prompt_tokens)

    def remove(self, row: int) -> None:
        """Frees a row.

        Raises:
            KeyError: there is no such row.
        """
        self._forget_steady()
        del self._rows[row]
        self._table.remove(row)
        self._asking.discard(row)

    def append(self, rows: list[int], token_ids: list[int] | Tensor) -> None:
        """Notes one output token for each of the rows; a row may come more than once, in order.

        Args:
            token_ids: [len(rows)] int64; on the device where the sampler left them, and nothing waits for them.
        """
        steady = self._steady
        if steady is not None and rows == steady.rows:
            if steady.num_tokens is not None:
                self._append_to_steady(steady, steady.num_tokens, token_ids)
        elif not self._asking.isdisjoint(rows):
            self._forget_steady()
            self._append_to_some(rows, token_ids)

    def batch(self, rows: list[int]) -> SamplingBatch:
        """Returns what the rows ask of the token that each of them gets next, in the order given.

        Raises:
            KeyError: there is no such row.
        """
        steady = self._steady
        if steady is None or rows != steady.rows or steady.valid_for == steady.num_appended:
            self._forget_steady()
            steady = self._steady = self._gather(rows)
        batch, num_tokens = steady.batch, steady.num_tokens
        if num_tokens is None:
            return batch
        if batch.random is not None:
            batch = replace(batch, random=replace(batch.random, positions=num_tokens))
        if batch.penalties is not None and steady.penalized is not None:
            lengths = num_tokens.index_select(0, batch.penalties.rows)
            token_ids, counts = self._table.select(steady.penalized, lengths, steady.longest + steady.num_appended)
            batch = replace(batch, penalties=replace(batch.penalties, token_ids=token_ids, output_counts=counts))
        if steady.bad_words is not None:
            batch = replace(batch, edits=(*batch.edits, steady.bad_words.forbidden(self._table, num_tokens)))
        return batch

    def _append_to_steady(self, steady: _Steady, num_tokens: Tensor, token_ids: list[int] | Tensor) -> None:
        steady.num_appended += 1
        steady.num_tokens = num_tokens + 1
        if steady.looking is not None:
            index, slots = steady.looking
            tokens = self._to_device(token_ids)
            self._table.make_room(steady.longest + steady.num_appended)
            self._table.append(slots, num_tokens.index_select(0, index), tokens.index_select(0, index))

    def _append_to_some(self, rows: list[int], token_ids: list[int] | Tensor) -> None:
        looking: list[int] = []
        positions: list[int] = []
        for index, row in enumerate(rows):
            state = self._rows[row]
            if state is None:
                continue
            if row in self._table:
                looking.append(index)
                positions.append(state.num_tokens)
            state.num_tokens += 1
        if looking:
            self._table.make_room(max(positions) + 1)
            tokens = self._to_device(token_ids).index_select(0, upload_ints(looking, self._device))
            slots = self._table.slots([rows[index] for index in looking])
            self._table.append(slots, upload_ints(positions, self._device), tokens)

    def _to_device(self, token_ids: list[int] | Tensor) -> Tensor:
        return token_ids if isinstance(token_ids, Tensor) else upload_ints(token_ids, self._device)

    def _forget_steady(self) -> None:
        """Before rows change: writes back how many tokens the rows of the last batch have."""
        if self._steady is not None:
            for _, state in self._steady.asking:
                state.num_tokens += self._steady.num_appended
            self._steady = None

    def _gather(self, rows: list[int]) -> _Steady:
        states = [self._rows[row] for row in rows]
        asking = [(index, state) for index, state in enumerate(states) if state is not None]
        if not asking:
            return _Steady(list(rows), SamplingBatch(num_rows=len(rows)), asking)
        num_tokens = np.zeros(len(rows), dtype=np.int64)
        for index, state in asking:
            num_tokens[index] = state.num_tokens
        numbers = np.asarray(rows, dtype=np.int64)
        edits = self._edits(asking)
        batch = SamplingBatch(
            num_rows=len(rows),
            random=self._random(numbers),
            edits=() if edits is None else (edits,),
            penalties=self._penalties(numbers),
            logprobs=self._logprobs(len(rows), asking),
        )
        until = [state.min_num_tokens - state.num_tokens for _, state in asking if _is_short(state)]
        steady = _Steady(list(rows), batch, asking, num_tokens=upload(num_tokens, self._device))
        steady.valid_for = min(until, default=None)
        self._look_back(steady)
        return steady

    def _look_back(self, steady: _Steady) -> None:
        """Fills in what concerns the rows in the token table."""
        rows = steady.rows
        looking = [(index, state) for index, state in steady.asking if rows[index] in self._table]
        if not looking:
            return
        indices = [index for index, _ in looking]
        steady.looking = upload_ints(indices, self._device), self._table.slots([rows[index] for index in indices])
        steady.longest = max(state.num_tokens for _, state in looking)
        if steady.batch.penalties is not None:
            steady.penalized = self._table.slots([row for row in rows if self._parameters.has_penalties(row)])
        words = [(index, word) for index, state in looking for word in state.bad_words]
        if words:
            indices = [index for index, _ in words]
            slots = self._table.slots([rows[index] for index in indices])
            steady.bad_words = BadWords.build(indices, slots, [word for _, word in words], self._device)

    def _random(self, rows: NDArray[np.int64]) -> RandomRows | None:
        found = self._parameters.random(rows)
        if found is None:
            return None
        floats, ints = upload(found.floats, self._device), upload(found.ints, self._device)
        return RandomRows(
            temperature=floats[0],
            top_k=ints[1],
            top_p=floats[1],
            min_p=floats[2],
            has_filters=found.has_filters,
            seeds=ints[0],
            positions=ints[0],  # in their place until `batch` knows them
        )

    def _penalties(self, rows: NDArray[np.int64]) -> PenaltyRows | None:
        indices, penalties = self._parameters.penalties(rows)
        if not indices.size:
            return None
        repetition, presence, frequency = upload(penalties, self._device).unbind()
        index = upload(indices, self._device)
        return PenaltyRows(index, index, index, repetition, presence, frequency)  # `batch` puts in tokens and counts

    def _edits(self, asking: list[tuple[int, _Row]]) -> TokenEdits | None:
        """What is added to the same logits in every step."""
        rows: list[int] = []
        token_ids: list[int] = []
        biases: list[float] = []
        for index, state in asking:
            bias = {t: value for t, value in (state.params.logit_bias or {}).items() if t < self._vocab_size}
            forbidden = [*state.bad_tokens, *(state.stop_ids if _is_short(state) else ())]
            rows += [index] * (len(bias) + len(forbidden))
            token_ids += [*bias, *forbidden]
            biases += [*bias.values(), *[float("-inf")] * len(forbidden)]
        if not rows:
            return None
        device = self._device
        values = upload(np.asarray(biases, dtype=np.float32), device)
        return TokenEdits(upload_ints(rows, device), upload_ints(token_ids, device), values)

    def _logprobs(self, num_rows: int, asking: list[tuple[int, _Row]]) -> LogprobRows | None:
        wanting = [index for index, state in asking if state.params.logprobs is not None]
        if not wanting:
            return None
        num_top: list[int | None] = [None] * num_rows
        for index, state in asking:
            num_top[index] = state.params.logprobs
        return LogprobRows(upload_ints(wanting, self._device), num_top)


def _is_short(state: _Row) -> bool:
    return state.num_tokens < state.min_num_tokens
