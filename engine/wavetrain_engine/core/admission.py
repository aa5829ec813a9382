# SPDX-License-Identifier: Apache-2.0
"""What the engine accepts: every check of a request that needs to know the loaded model.

Ranges of sampling parameters are checked where they are made (`SamplingParams`); here is only what
depends on the vocabulary and on max_model_len.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterable

from wavetrain_engine.errors import InvalidSamplingParams, PromptTooLong, RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams


def check_prompt(request: EngineRequest, facts: EngineFacts) -> list[int]:
    """Returns the prompt as a list of plain integers that is the core's own.

    Raises:
        PromptTooLong: no room for an output token is left within max_model_len.
        RequestError: it is empty, or holds what is not a token id of this model.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("the prompt is empty; send at least one token")
    if len(prompt) >= facts.max_model_len:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens, but max_model_len is {facts.max_model_len} and leaves room for "
            f"prompts of at most {facts.max_model_len - 1}; shorten it"
        )
    try:
        token_ids = array("q", prompt).tolist()  # checks every type at the speed of C, and makes plain ints
    except TypeError:
        raise RequestError("prompt_token_ids must hold integers only") from None
    except OverflowError:
        raise RequestError(f"a prompt token id is beyond the vocabulary of {facts.vocab_size} tokens") from None
    _check_vocabulary("prompt token id", token_ids, facts.vocab_size, RequestError)
    return token_ids


def check_sampling_params(params: SamplingParams, facts: EngineFacts) -> SamplingParams:
    """Returns the parameters as the executor gets them: with a seed drawn, where sampling needs one.

    The seed is drawn here, once, so that a request that is preempted and resumed goes on as it began.

    Raises:
        InvalidSamplingParams: a token id is beyond the vocabulary, more log-probabilities are wanted than
            there are tokens, or n is not 1.
    """
    if params.n != 1:
        raise InvalidSamplingParams(f"n must be 1 at the engine core, got {params.n}; send n requests instead")
    size = facts.vocab_size
    _check_vocabulary("stop_token_ids", params.stop_token_ids, size, InvalidSamplingParams)
    if params.logit_bias:
        _check_vocabulary("logit_bias's token id", params.logit_bias, size, InvalidSamplingParams)
    for sequence in params.bad_words_token_ids:
        if not sequence:
            raise InvalidSamplingParams("bad_words_token_ids must not hold an empty sequence; leave it out")
        _check_vocabulary("bad_words_token_ids", sequence, size, InvalidSamplingParams)
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and count > size:
            raise InvalidSamplingParams(f"{name} is {count}, but the vocabulary has only {size} tokens; lower it")
    if params.seed is None and not params.is_greedy:
        return params.replace(seed=secrets.randbits(63))
    return params


def max_num_tokens(params: SamplingParams, num_prompt_tokens: int, facts: EngineFacts) -> int:
    """Prompt and output tokens at most: max_tokens, clipped to the room max_model_len leaves, as vLLM does."""
    if params.max_tokens is None:
        return facts.max_model_len
    return min(num_prompt_tokens + params.max_tokens, facts.max_model_len)


def _check_vocabulary(what: str, token_ids: Iterable[int], size: int, error: type[RequestError]) -> None:
    low, high = min(token_ids, default=0), max(token_ids, default=0)
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise error(f"{what} {bad} is not in the vocabulary, whose {size} tokens are numbered 0 to {size - 1}")
