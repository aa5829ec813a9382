# SPDX-License-Identifier: Apache-2.0
"""What a caller gets: chunks of a stream, and the whole generation they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

FinishReason = Literal["stop", "length", "cancelled", "error"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely one token was at one position; NaN for the first token of a prompt, which nothing comes before."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfMetrics:
    """What a request cost on the server; times are nanoseconds of its clock, None where it sent nothing."""

    arrival_time_ns: int | None = None
    first_scheduled_time_ns: int | None = None
    first_token_time_ns: int | None = None
    last_token_time_ns: int | None = None
    kv_cache_alloc_new_blocks: int | None = None
    kv_cache_reused_blocks: int | None = None
    kv_cache_alloc_total_blocks: int | None = None
    acceptance_rate: float | None = None
    total_accepted_draft_tokens: int | None = None
    total_draft_tokens: int | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """News of one sequence.

    Attributes:
        text: new text only; all chunks' texts together are the whole output. May be empty.
        token_ids: new token ids, from the model `engine` only.
        finish_reason: set on the last chunk of the sequence, and only there.
        sequence_index: which of the `n` sequences.
        num_input_tokens: length of the prompt, where the server sent it.
        num_output_tokens: tokens in this chunk, where the server sent it; it may be more than one.
        logprobs: for each new token, token id to Logprob; None when not asked for. From `llm` only.
        token_logprobs: log-probability of each new token; from `ensemble` and `engine` only.
        cumulative_logprob: sum of the sampled tokens' log-probabilities so far.
        perf_metrics: on the last chunk, when asked for.
        prompt_logprobs: for each token of the prompt, once, when asked for; with sequence 0. From `llm` only.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    sequence_index: int = 0
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    token_logprobs: tuple[float, ...] | None = None
    cumulative_logprob: float | None = None
    perf_metrics: PerfMetrics | None = None
    prompt_logprobs: tuple[Mapping[int, Logprob], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSequence:
    """One finished sequence; the fields are Chunk's, added up."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_output_tokens: int | None
    logprobs: tuple[Mapping[int, Logprob], ...] | None
    token_logprobs: tuple[float, ...] | None
    cumulative_logprob: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished request. `outputs` has one entry for each of the `n` sequences; the properties are the first's."""

    request_id: str
    model: str
    outputs: tuple[GeneratedSequence, ...]
    num_input_tokens: int | None = None
    perf_metrics: PerfMetrics | None = None
    prompt_logprobs: tuple[Mapping[int, Logprob], ...] | None = None

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first sequence's token ids; empty but for the model `engine`."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first sequence ended."""
        return self.outputs[0].finish_reason

    @property
    def num_output_tokens(self) -> int | None:
        """The first sequence's length in tokens."""
        return self.outputs[0].num_output_tokens

    @property
    def logprobs(self) -> tuple[Mapping[int, Logprob], ...] | None:
        """The first sequence's log-probabilities."""
        return self.outputs[0].logprobs

    @property
    def token_logprobs(self) -> tuple[float, ...] | None:
        """The first sequence's log-probability for each sampled token."""
        return self.outputs[0].token_logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the first sequence's log-probabilities."""
        return self.outputs[0].cumulative_logprob


def join_chunks(request_id: str, model: str, chunks: Iterable[Chunk]) -> Generation:
    """Adds the chunks of a finished request up; sequences come out in the order of their index."""
    by_index: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_index.setdefault(chunk.sequence_index, []).append(chunk)
    every = [chunk for parts in by_index.values() for chunk in parts]
    return Generation(
        request_id=request_id,
        model=model,
        outputs=tuple(_join_sequence(by_index[index]) for index in sorted(by_index)),
        num_input_tokens=_last(chunk.num_input_tokens for chunk in every),
        perf_metrics=_last(chunk.perf_metrics for chunk in every),
        prompt_logprobs=_last(chunk.prompt_logprobs for chunk in every),
    )


def _join_sequence(parts: list[Chunk]) -> GeneratedSequence:
    counts = [part.num_output_tokens for part in parts if part.num_output_tokens is not None]
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    token_logprobs = [part.token_logprobs for part in parts if part.token_logprobs is not None]
    finish_reason: FinishReason | None = None
    for part in parts:
        finish_reason = part.finish_reason or finish_reason
    return GeneratedSequence(
        text="".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        finish_reason=finish_reason,
        num_output_tokens=sum(counts) if counts else None,
        logprobs=tuple(position for part in logprobs for position in part) if logprobs else None,
        token_logprobs=tuple(value for part in token_logprobs for value in part) if token_logprobs else None,
        cumulative_logprob=_last(part.cumulative_logprob for part in parts),
    )


def _last(values: Iterable[_T | None]) -> _T | None:
    found: _T | None = None
    for value in values:
        found = value if value is not None else found
    return found
