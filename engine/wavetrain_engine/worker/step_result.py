# SPDX-License-Identifier: Apache-2.0
"""What a step produced, aligned with the rows of its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from wavetrain_engine.plan import StepResult
from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling.sampler import SampledTokens
from wavetrain_engine.worker.prompt_scores import PromptScores

_Value = TypeVar("_Value")


def make_result(
    num_rows: int, sampling: list[int], tokens: SampledTokens | None, scores: Sequence[PromptScores]
) -> StepResult:
    """Returns the result of a step of so many rows.

    Args:
        sampling: the rows that sampled, in order.
        tokens: theirs; None where there are none.
        scores: of the prompts that were to be scored, on the host.
    """
    prompt: list[list[TokenLogprobs] | None] = [None] * num_rows if scores else []
    for score in scores:
        prompt[score.index] = score.entries()
    if tokens is None:
        return StepResult(sampled_token_ids=[[] for _ in range(num_rows)], prompt_logprobs=prompt)
    sampled = [[token_id] for token_id in tokens.token_ids]
    has_logprobs = tokens.logprobs.count(None) < len(tokens.logprobs)
    logprobs = [None if entry is None else [entry] for entry in tokens.logprobs] if has_logprobs else []
    for index in tokens.errors:
        sampled[index] = []
    errors = {sampling[index]: message for index, message in tokens.errors.items()}
    if len(sampling) < num_rows:
        sampled = _spread(sampled, sampling, [[] for _ in range(num_rows)])
        logprobs = _spread(logprobs, sampling, [None] * num_rows) if logprobs else []
    return StepResult(sampled_token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt, errors=errors)


def _spread(values: list[_Value], indices: list[int], results: list[_Value]) -> list[_Value]:
    """Puts values at their indices among the results of all rows."""
    for index, value in zip(indices, values, strict=True):
        results[index] = value
    return results
