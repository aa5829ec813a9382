# SPDX-License-Identifier: Apache-2.0
"""The border between the scheduler (integers) and the executor (tensors): one plan in, one result out.

A plan says, for each scheduled request, which span of its tokens to compute next. It does not carry
sampled tokens back to the executor: the executor keeps each request's tokens and appends what it
samples itself, so a plan may be made while the step before it is still running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request the executor does not know (new, or resumed after preemption).

    Attributes:
        token_ids: prompt and, on resumption, the output tokens so far.
        sampling_params: with a seed, unless the request is greedy.
        num_prompt_tokens: how many of `token_ids` are prompt.
        block_ids: all blocks it holds, in order.
        num_computed_tokens: tokens whose KV is in those blocks already (prefix cache).
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    block_ids: list[int]
    num_computed_tokens: int


class ScheduledRequest(msgspec.Struct, frozen=True, gc=False):
    """One row of the step: compute tokens [num_computed_tokens, num_computed_tokens + num_scheduled_tokens).

    A struct, as a step makes one for each request: a frozen dataclass takes ten times as long to make.

    Attributes:
        new_block_ids: blocks to append to the row's block table; empty for a request admitted in
            this very plan (its AdmittedRequest has them all).
        is_sampling: the span ends at the request's last token, so a token is sampled from it.
    """

    request_id: str
    num_computed_tokens: int
    num_scheduled_tokens: int
    new_block_ids: Sequence[int]
    is_sampling: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. The executor applies `removed`, then `admitted`, then computes `scheduled` in order.

    Attributes:
        removed: ids of finished, cancelled or preempted requests; the executor forgets them.
    """

    step_id: int
    removed: list[str]
    admitted: list[AdmittedRequest]
    scheduled: list[ScheduledRequest]

    @property
    def num_tokens(self) -> int:
        """All tokens computed in this step."""
        return sum(row.num_scheduled_tokens for row in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced; every list that is not empty is aligned with `plan.scheduled`.

    Attributes:
        sampled_token_ids: per row the sampled ids (empty where `is_sampling` is false; more than one
            only with accepted draft tokens).
        logprobs: per row one TokenLogprobs per sampled id, or None where not asked for; no entries where no row did.
        prompt_logprobs: per row the entries for the prompt positions that this span predicts
            (position p's logits give the entry of prompt token p + 1), or None; no entries as above.
        errors: rows whose logits were NaN or inf, by index, with a message; they sample nothing.
    """

    sampled_token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None] = field(default_factory=list[list[TokenLogprobs] | None])
    prompt_logprobs: list[list[TokenLogprobs] | None] = field(default_factory=list[list[TokenLogprobs] | None])
    errors: dict[int, str] = field(default_factory=dict[int, str])


class PendingResult(Protocol):
    """A submitted step that may still be running."""

    def result(self) -> StepResult:
        """Blocks until the step is done. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs plans in the order they are submitted, on whatever device it owns."""

    def submit(self, plan: StepPlan) -> PendingResult:
        """Starts a step. With depth 0 it may run it to the end before it returns."""
        ...

    def shutdown(self) -> None:
        """Frees the device. Idempotent; no submit may follow."""
        ...
