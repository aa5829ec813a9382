# SPDX-License-Identifier: Apache-2.0
"""When a request ends, and what its caller is told: stop conditions and updates, without side effects."""

from __future__ import annotations

from wavetrain_engine.core.request_state import RequestState
from wavetrain_engine.errors import WavetrainError
from wavetrain_engine.request import FinishReason, RequestStats, RequestUpdate, TokenLogprobs


def find_end(request: RequestState, token_id: int) -> FinishReason | None:
    """Whether the request ends with `token_id`, its last token, just appended; None: it goes on.

    The sampler masks end tokens before min_tokens; the core does not stop there either. Stop strings are
    the front ends' business: the core never sees text.
    """
    if token_id in request.end_token_ids and request.num_tokens >= request.min_num_tokens:
        return FinishReason.STOP
    if request.num_tokens >= request.max_num_tokens:
        return FinishReason.LENGTH
    return None


def last_token_update(
    request: RequestState,
    token_ids: list[int],
    finish_reason: FinishReason,
    *,
    logprobs: list[TokenLogprobs] | None,
    prompt_logprobs: list[TokenLogprobs] | None,
) -> RequestUpdate:
    """The last update of a request that the last of these tokens ended."""
    is_stop_token = finish_reason is FinishReason.STOP and token_ids[-1] not in request.eos_token_ids
    return RequestUpdate(
        request_id=request.request_id,
        new_token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish_reason,
        stop_token_id=token_ids[-1] if is_stop_token else None,
        stats=request_stats(request),
    )


def end_update(request: RequestState, finish_reason: FinishReason, error: WavetrainError | None) -> RequestUpdate:
    """The last update of a request that ends without a new token."""
    return RequestUpdate(
        request_id=request.request_id,
        finish_reason=finish_reason,
        error_code=None if error is None else error.code,
        error=None if error is None else str(error),
        stats=request_stats(request),
    )


def rejection(request_id: str, error: WavetrainError) -> RequestUpdate:
    """The only update of a request that was not accepted."""
    return RequestUpdate(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error_code=error.code,
        error=str(error),
        stats=RequestStats(),
    )


def request_stats(request: RequestState) -> RequestStats:
    """What the request has cost so far."""
    return RequestStats(
        arrival_time_ns=request.arrival_time_ns,
        first_scheduled_time_ns=request.first_scheduled_time_ns,
        first_token_time_ns=request.first_token_time_ns,
        last_token_time_ns=request.last_token_time_ns,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_tokens - request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_new_blocks=request.num_new_blocks,
        num_reused_blocks=request.num_reused_blocks,
        num_preemptions=request.num_preemptions,
    )
