# SPDX-License-Identifier: Apache-2.0
"""What the sampler must know of every running request, kept from step to step by the worker's row numbers.

A row is added when its request is admitted (or resumed: its output so far is part of `token_ids`), told of each token
that it gains, and removed when the request leaves. `batch` then gathers the rows of a step. What only changes when
other rows are asked for is kept between steps, so a steady batch of greedy rows costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from wavetrain_engine.sampling.batch import PenaltyRows, RandomRows, SamplingBatch, TokenEdits
from wavetrain_engine.sampling.penalty_table import PenaltyTable
from wavetrain_engine.sampling_params import SamplingParams

# Below this a temperature is as good as 0, and dividing by it would not be (vLLM's bound).
_MIN_TEMPERATURE = 1e-5


@dataclass(slots=True)
class _Row:
    """One request.

    Attributes:
        num_tokens: prompt and output tokens: the position of the next one; not kept up for a row that asks for nothing.
        stop_ids: tokens that may not come before min_tokens; empty where min_tokens is 0.
        bad_words: forbidden sequences.
        history: the latest tokens, as many as the longest bad word looks back on.
        seed: as int64.
    """

    params: SamplingParams
    num_prompt_tokens: int
    num_tokens: int
    seed: int
    is_greedy: bool
    stop_ids: list[int]
    bad_words: list[list[int]]
    history: list[int]
    num_history: int

    @property
    def has_forbidden(self) -> bool:
        return bool(self.bad_words) or self.num_tokens - self.num_prompt_tokens < self.params.min_tokens


class SamplingState:
    """The sampling side of the worker's rows. Not thread-safe; the worker's thread owns it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[int, _Row] = {}
        # Rows that ask for more than the likeliest token, and those that may forbid some; no step looks at any other.
        self._asking: set[int] = set()
        self._forbidding: set[int] = set()
        self._penalties = PenaltyTable(device)
        self._batched_rows: list[int] | None = None  # what _batch was made for; None since a row was added
        self._batch = SamplingBatch(num_rows=0)

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
        bad_words = [words for words in params.bad_words_token_ids if words and words[-1] < self._vocab_size]
        num_history = max((len(words) - 1 for words in bad_words), default=0)
        stop_ids = {*eos_token_ids, *params.stop_token_ids} if params.min_tokens else set[int]()
        state = self._rows[row] = _Row(
            params=params,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=len(token_ids),
            seed=_to_int64(seed),
            is_greedy=params.is_greedy or params.temperature < _MIN_TEMPERATURE,
            stop_ids=sorted(token_id for token_id in stop_ids if token_id < self._vocab_size),
            bad_words=bad_words,
            history=token_ids[max(0, len(token_ids) - num_history) :],
            num_history=num_history,
        )
        if _has_penalties(params):
            self._penalties.add(row, token_ids, num_prompt_tokens)
        if bad_words or params.min_tokens:
            self._forbidding.add(row)
        is_edited = row in self._forbidding or row in self._penalties or bool(params.logit_bias)
        if is_edited or params.logprobs is not None or not state.is_greedy:
            self._asking.add(row)
        self._batched_rows = None

    def remove(self, row: int) -> None:
        """Frees a row.

        Raises:
            KeyError: there is no such row.
        """
        del self._rows[row]
        self._penalties.remove(row)
        self._asking.discard(row)
        self._forbidding.discard(row)
        self._batched_rows = None

    def append(self, rows: list[int], token_ids: list[int]) -> None:
        """Notes one output token for each of the rows; a row may come more than once, in order."""
        if self._asking.isdisjoint(rows):
            return
        penalized: list[int] = []
        counted: list[int] = []
        for row, token_id in zip(rows, token_ids, strict=True):
            if row not in self._asking:
                continue
            state = self._rows[row]
            state.num_tokens += 1
            if state.num_history:
                state.history = [*state.history, token_id][-state.num_history :]
            if row in self._penalties:
                penalized.append(row)
                counted.append(token_id)
        if penalized:
            self._penalties.append(penalized, counted)

    def batch(self, rows: list[int]) -> SamplingBatch:
        """Returns what the rows ask of the token that each of them gets next, in the order given.

        Raises:
            KeyError: there is no such row.
        """
        states = [] if self._asking.isdisjoint(rows) else [self._rows[row] for row in rows]
        if rows != self._batched_rows:
            self._batch = self._build(rows, states) if states else self._plain(rows)
            self._batched_rows = list(rows)
        batch = self._batch
        if not states:
            return batch
        if batch.random is not None:
            positions = self._int64([state.num_tokens for state in states if not state.is_greedy])
            batch = replace(batch, random=replace(batch.random, positions=positions))
        if batch.penalties is not None:
            token_ids, counts = self._penalties.select([row for row in rows if row in self._penalties])
            batch = replace(batch, penalties=replace(batch.penalties, token_ids=token_ids, output_counts=counts))
        if not self._forbidding.isdisjoint(rows) and any(state.has_forbidden for state in states):
            batch = replace(batch, forbidden=self._forbidden(states))
        return batch

    def _plain(self, rows: list[int]) -> SamplingBatch:
        for row in rows:
            if row not in self._rows:
                raise KeyError(row)
        return SamplingBatch(num_rows=len(rows))

    def _build(self, rows: list[int], states: list[_Row]) -> SamplingBatch:
        """Everything of the batch that stays the same while its rows do; the rest is left for `batch` to replace."""
        num_logprobs = [state.params.logprobs for state in states]
        return SamplingBatch(
            num_rows=len(rows),
            random=self._random(states),
            penalties=self._penalized(rows, states),
            bias=self._bias(states),
            num_logprobs=num_logprobs if any(k is not None for k in num_logprobs) else None,
        )

    def _random(self, states: list[_Row]) -> RandomRows | None:
        rows = [index for index, state in enumerate(states) if not state.is_greedy]
        if not rows:
            return None
        params = [states[index].params for index in rows]
        has_top_k = any(0 < p.top_k < self._vocab_size for p in params)
        return RandomRows(
            rows=self._int64(rows) if len(rows) < len(states) else None,
            temperature=self._float32([p.temperature for p in params]),
            top_k=self._int64([max(p.top_k, 0) for p in params]) if has_top_k else None,
            top_p=self._float32([p.top_p for p in params]) if any(p.top_p < 1.0 for p in params) else None,
            min_p=self._float32([p.min_p for p in params]) if any(p.min_p > 0.0 for p in params) else None,
            seeds=self._int64([states[index].seed for index in rows]),
            positions=self._int64([]),
        )

    def _penalized(self, rows: list[int], states: list[_Row]) -> PenaltyRows | None:
        indices = [index for index, row in enumerate(rows) if row in self._penalties]
        if not indices:
            return None
        params = [states[index].params for index in indices]
        none = self._int64([])
        return PenaltyRows(
            rows=self._int64(indices),
            token_ids=none,
            output_counts=none,
            repetition=self._float32([p.repetition_penalty for p in params]),
            presence=self._float32([p.presence_penalty for p in params]),
            frequency=self._float32([p.frequency_penalty for p in params]),
        )

    def _bias(self, states: list[_Row]) -> TokenEdits | None:
        rows: list[int] = []
        token_ids: list[int] = []
        biases: list[float] = []
        for index, state in enumerate(states):
            for token_id, bias in (state.params.logit_bias or {}).items():
                if token_id < self._vocab_size:
                    rows.append(index)
                    token_ids.append(token_id)
                    biases.append(bias)
        return TokenEdits(self._int64(rows), self._int64(token_ids), self._float32(biases)) if rows else None

    def _forbidden(self, states: list[_Row]) -> TokenEdits | None:
        rows: list[int] = []
        token_ids: list[int] = []
        for index, state in enumerate(states):
            forbidden = {words[-1] for words in state.bad_words if _ends_with(state.history, words[:-1])}
            if state.num_tokens - state.num_prompt_tokens < state.params.min_tokens:
                forbidden.update(state.stop_ids)
            rows += [index] * len(forbidden)
            token_ids += sorted(forbidden)
        return TokenEdits(self._int64(rows), self._int64(token_ids), None) if rows else None

    def _int64(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _float32(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _ends_with(history: list[int], prefix: list[int]) -> bool:
    return len(prefix) <= len(history) and history[len(history) - len(prefix) :] == prefix


def _to_int64(seed: int) -> int:
    """The int64 with the low 64 bits of a seed, which may come as signed or unsigned."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
