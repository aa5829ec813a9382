# SPDX-License-Identifier: Apache-2.0
"""From what a caller asks to what the core runs: one core request per sequence. Never imports torch.

Used by every front end, the offline API and the Triton models alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from wavetrain_engine.errors import (
    DeadlineExceeded,
    EngineDead,
    ErrorCode,
    InvalidSamplingParams,
    QueueFull,
    RequestCancelled,
    RequestError,
    RequestFailed,
    UnknownAdapter,
    WavetrainError,
)
from wavetrain_engine.outputs import Logprob
from wavetrain_engine.request import EngineRequest, RequestUpdate, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.text.bad_words import bad_words_token_ids
from wavetrain_engine.text.tokenizer import Tokenizer

_MAX_SEED = 2**64 - 1

_ERRORS: dict[ErrorCode, type[WavetrainError]] = {
    ErrorCode.INVALID: RequestError,
    ErrorCode.NOT_FOUND: UnknownAdapter,
    ErrorCode.BUSY: QueueFull,
    ErrorCode.CANCELLED: RequestCancelled,
    ErrorCode.DEADLINE: DeadlineExceeded,
    ErrorCode.DEAD: EngineDead,
    ErrorCode.INTERNAL: RequestFailed,
}


def resolve_params(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """Returns the parameters with everything in text that the core needs as token ids.

    Raises:
        InvalidSamplingParams: stop strings or bad words where there is no text.
    """
    if params.stop and (tokenizer is None or not params.detokenize):
        raise InvalidSamplingParams(
            "stop needs text, but there is no tokenizer or detokenize is false; use stop_token_ids"
        )
    if not params.bad_words:
        return params
    if tokenizer is None:
        raise InvalidSamplingParams("bad_words needs a tokenizer, and there is none; use bad_words_token_ids")
    sequences = bad_words_token_ids(tokenizer, params.bad_words)
    return params.replace(bad_words=[], bad_words_token_ids=[*params.bad_words_token_ids, *sequences])


def child_requests(request: EngineRequest) -> list[EngineRequest]:
    """Returns `sampling_params.n` requests of one sequence each.

    Child 0 generates what a request with n = 1 would; child i has the seed `seed + i`. Only child 0
    computes prompt_logprobs. The ids are the request's own for n = 1, else `0_<id>`, `1_<id>`, ...
    """
    params = request.sampling_params
    if params.n == 1:
        return [request]
    children: list[EngineRequest] = []
    for index in range(params.n):
        child = EngineRequest(
            request_id=f"{index}_{request.request_id}",
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=_child_params(params, index),
            priority=request.priority,
            deadline_s=request.deadline_s,
            cache_salt=request.cache_salt,
            arrival_time_ns=request.arrival_time_ns,
            traceparent=request.traceparent,
        )
        children.append(child)
    return children


def _child_params(params: SamplingParams, index: int) -> SamplingParams:
    if index == 0:
        return params.replace(n=1)
    seed = params.seed
    if seed is not None:
        seed = seed + index if seed + index <= _MAX_SEED else seed + index - _MAX_SEED - 1
    return params.replace(n=1, seed=seed, prompt_logprobs=None)


def error_of(update: RequestUpdate) -> WavetrainError | None:
    """Returns the error that a request ended with, as the class its code stands for."""
    if update.error_code is None:
        return None
    return _ERRORS[update.error_code](update.error or "the request failed")


def logprob_dict(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Returns one position's log-probabilities by token id: the actual token first, then the top-k."""
    table: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True):
        if token_id not in table:
            table[token_id] = Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token_id))
    return table


def prompt_logprob_dicts(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob] | None]:
    """Returns vLLM's list: None for the first prompt token, then one dict per token."""
    return [None, *(logprob_dict(entry, tokenizer) for entry in entries)]
