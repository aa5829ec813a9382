# SPDX-License-Identifier: Apache-2.0
"""The requests that a runner holds: their rows, what the sampler knows of them, and whose prompt is to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from wavetrain_engine.plan import ScheduledRequest, StepPlan
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.worker.input_batch import InputBatch

_Batch = TypeVar("_Batch", bound=InputBatch)


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Prompt positions of one row whose log-probabilities are wanted.

    Attributes:
        index: the row's place in the plan.
        first: where the first position's token is among the tokens of the step.
        targets: the tokens that the positions should predict, int64.
        num_logprobs: how many likelier ones to tell for each.
    """

    index: int
    first: int
    targets: NDArray[np.int64]
    num_logprobs: int


class LiveRequests(Generic[_Batch]):
    """Keeps the input batch and the sampler's state in step with the plans.

    Args:
        eos_token_ids: masked by the sampler until a request has its min_tokens.
    """

    def __init__(self, batch: _Batch, state: SamplingState, eos_token_ids: list[int]) -> None:
        self.batch = batch
        self.state = state
        self._eos_token_ids = eos_token_ids
        # Requests whose prompt is to be scored; none, usually, and then no step looks for them.
        self._scored: set[str] = set()

    @property
    def has_scored(self) -> bool:
        """Whether some prompt is still to be scored."""
        return bool(self._scored)

    def apply(self, plan: StepPlan) -> None:
        """Forgets who left and takes in who came."""
        for request_id in plan.removed:
            entry = self.batch.remove(request_id)
            if entry is not None:
                self.state.remove(entry.row)
                self._scored.discard(request_id)
        for request in plan.admitted:
            entry = self.batch.add(request)
            params, num_prompt_tokens = request.sampling_params, request.num_prompt_tokens
            seed = params.seed or 0  # the scheduler's side has drawn one for whoever samples
            self.state.add(entry.row, params, request.token_ids, num_prompt_tokens, self._eos_token_ids, seed)
            # Who is resumed with output has had the scores of its prompt with its first token.
            if params.prompt_logprobs is not None and len(request.token_ids) == num_prompt_tokens:
                self._scored.add(request.request_id)

    def prompt_spans(
        self, scheduled: Sequence[ScheduledRequest], query_start_loc: NDArray[np.int32]
    ) -> list[PromptSpan]:
        """Returns what of the step's tokens is to be scored; each position of a prompt comes up once."""
        spans: list[PromptSpan] = []
        for index, item in enumerate(scheduled):
            if item.request_id not in self._scored:
                continue
            entry = self.batch[item.request_id]
            start = item.num_computed_tokens
            end = min(start + item.num_scheduled_tokens, entry.num_prompt_tokens - 1)
            if end == entry.num_prompt_tokens - 1:
                self._scored.discard(item.request_id)
            if end > start:
                targets = self.batch.prompt_targets(entry.row, start, end)
                num_logprobs = entry.sampling_params.prompt_logprobs or 0
                spans.append(PromptSpan(index, int(query_start_loc[index]), targets, num_logprobs))
        return spans
