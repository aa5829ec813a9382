# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask for: the sampling options by name, and one request with all of them.

Names and meanings are vLLM's. An option that is not given is not sent, so the server's default holds. Ranges are the
server's to check: it names the bad parameter in its answer. Here only names and types are checked.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict, cast

from wavetrain_client.errors import RequestRejected


class SamplingOptions(TypedDict, total=False):
    """How to choose tokens and when to stop. All optional."""

    n: int  # sequences to generate from the prompt
    max_tokens: int  # output tokens at most
    min_tokens: int  # no end before that many output tokens
    temperature: float  # 0 is greedy
    top_k: int  # keep the k likeliest tokens
    top_p: float  # keep the smallest set of likeliest tokens whose probability reaches it
    min_p: float  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]  # added to the logits of these token ids
    seed: int  # same seed, same tokens, in any batch
    stop: str | Sequence[str]  # strings that end the output
    stop_token_ids: Sequence[int]  # tokens that end the output
    bad_words: Sequence[str]  # strings that must not be generated
    bad_words_token_ids: Sequence[Sequence[int]]  # the same as token ids
    ignore_eos: bool  # go on after the end-of-sequence token
    include_stop_str_in_output: bool
    skip_special_tokens: bool  # leave special tokens out of the text
    logprobs: int  # top-k log-probabilities per output token; 0: only the sampled token's
    prompt_logprobs: int  # the same for each token of the prompt
    echo: bool  # put the prompt in front of the output; not when streaming
    return_perf_metrics: bool  # time stamps and cache blocks of the request


Prompt: TypeAlias = "str | Sequence[int] | ChatPrompt"
OPTION_NAMES: tuple[str, ...] = tuple(SamplingOptions.__annotations__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages of a conversation, for the checkpoint's chat template to make a prompt of. Only `llm` takes them.

    Attributes:
        messages: each with `role` and `content`, JSON values.
        variables: what else the template may use (`add_generation_prompt`, `enable_thinking`, ...); JSON values.

    Raises:
        RequestRejected: the messages or variables are no JSON values.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _json: tuple[str, str] = field(init=False, repr=False, compare=False, default=("", ""))

    def __post_init__(self) -> None:
        try:
            texts = json.dumps(list(self.messages)), json.dumps(dict(self.variables))
        except (TypeError, ValueError, RecursionError):
            raise RequestRejected("chat messages must be JSON values: objects, lists, strings and numbers") from None
        object.__setattr__(self, "_json", texts)

    def to_json(self) -> tuple[str, str]:
        """Messages and variables, each as JSON text, as they were when this was made."""
        return self._json


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One generation to ask for, checked for what the server could not understand.

    Attributes:
        prompt: text; token ids, for the models `engine` and `llm`; or a conversation, for `llm`.
        model: name of the Triton model.
        options: sampling options by name.
        is_streaming: False asks for one response with everything.
        timeout_s: limit for connecting, waiting and streaming together; None: no limit.
        priority: lower runs earlier; None: the server's default.
        cache_salt: only requests of an equal salt share the prefix cache.
        traceparent: W3C's, of the trace that the engine's spans of the request belong to.
        request_id: unique among the server's unfinished requests; None: one is made.

    Raises:
        RequestRejected: a value that cannot be sent.
        TypeError: an option that does not exist; the nearest known one is named.
    """

    prompt: Prompt
    model: str = "llm"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_streaming: bool = True
    timeout_s: float | None = None
    priority: int | None = None
    cache_salt: str | None = None
    traceparent: str | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        for name in self.options:
            if name not in OPTION_NAMES:
                nearest = difflib.get_close_matches(name, OPTION_NAMES, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(OPTION_NAMES)}"
                raise TypeError(f"unknown option {name!r}{hint}")
        if not isinstance(self.prompt, (str, ChatPrompt)):
            object.__setattr__(self, "prompt", _checked_token_ids(self.prompt))
        if self.timeout_s is not None and not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise RequestRejected(f"timeout_s must be a positive number of seconds, got {self.timeout_s}")
        if self.request_id is None:
            object.__setattr__(self, "request_id", secrets.token_hex(16))
        elif not self.request_id:
            raise RequestRejected("request_id must not be empty; leave it out to have one made")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise RequestRejected(f"priority must fit 32 bits, got {self.priority}")

    @property
    def id(self) -> str:
        """The request's id, given or made."""
        return cast("str", self.request_id)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, without those that are None."""
        return {name: value for name, value in self.options.items() if value is not None}


def _checked_token_ids(values: object) -> list[int]:
    if isinstance(values, (bytes, bytearray)) or not isinstance(values, Sequence):
        raise RequestRejected(
            f"the prompt must be text, a list of token ids or a ChatPrompt, got {type(values).__name__}"
        )
    token_ids = list(cast("Sequence[Any]", values))
    if set(map(type, token_ids)) <= {int}:  # all of them in one go, as a prompt may be long
        return token_ids
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestRejected(f"a prompt of token ids must hold integers, got {str(token_id)[:64]!r}")
    return token_ids
