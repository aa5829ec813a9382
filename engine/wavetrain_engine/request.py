# SPDX-License-Identifier: Apache-2.0
"""What crosses the border between a front end (offline API, Triton model) and the engine core.

`EngineRequest` goes in; a stream of `RequestUpdate` comes out, the last of which, and only the last,
has a `finish_reason`. Both are msgspec structs, so the in-process and the IPC path share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import msgspec

from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.sampling_params import SamplingParams


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One sequence to generate. `sampling_params.n` is 1 here: front ends fan out.

    Attributes:
        request_id: unique among all unfinished requests of the core.
        priority: lower runs earlier and is preempted later (vLLM's convention).
        deadline_s: absolute `time.monotonic()` moment after which the request is ended; None: never.
        cache_salt: isolates the prefix cache: only requests with an equal salt share blocks.
        arrival_time_ns: `time.time_ns()` when the front end took the request.
        traceparent: of the caller's trace, as it was sent; "" where there is none.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    arrival_time_ns: int = 0
    traceparent: str = ""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the actual token first, then the top-k, best first.

    The actual token may appear again among the top-k; readers build a dict and so fold it.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class RequestStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a finished request cost. Times are `time.time_ns()`; 0 where it never happened."""

    arrival_time_ns: int = 0
    first_scheduled_time_ns: int = 0
    first_token_time_ns: int = 0
    last_token_time_ns: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_blocks: int = 0
    num_reused_blocks: int = 0
    num_preemptions: int = 0


class RequestUpdate(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """News of one request after a step.

    Attributes:
        new_token_ids: sampled since the last update; includes the EOS or stop token that ended it.
        logprobs: one entry per new token when asked for.
        prompt_logprobs: one entry per prompt token but the first, once the prompt is computed.
        finish_reason: set on the last update of the request, and only there.
        stop_token_id: the stop token that ended the request (None for EOS and everything else).
        error_code, error: set when the request ended with an error (reason `error` or `cancelled`).
        stats: on the last update.
    """

    request_id: str
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error_code: ErrorCode | None = None
    error: str | None = None
    stats: RequestStats | None = None


def merge_updates(updates: Sequence[RequestUpdate]) -> RequestUpdate:
    """Returns what consecutive updates of one request say, at least one of them, as one update."""
    last = updates[-1]
    if len(updates) == 1:
        return last
    return msgspec.structs.replace(
        last,
        new_token_ids=[token_id for update in updates for token_id in update.new_token_ids],
        logprobs=_joined([update.logprobs for update in updates]),
        prompt_logprobs=_joined([update.prompt_logprobs for update in updates]),
    )


def _joined(parts: Sequence[list[TokenLogprobs] | None]) -> list[TokenLogprobs] | None:
    if all(part is None for part in parts):
        return None
    return [entry for part in parts for entry in part or ()]
