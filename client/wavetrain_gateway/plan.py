# SPDX-License-Identifier: Apache-2.0
"""From a request's body to what is to be run and how it is to be answered: pure functions.

A plan has one prompt or several; each is run once and gives `num_generated` sequences, of which `num_choices` are
answered.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from wavetrain_client import ChatPrompt, GenerationRequest, Prompt
from wavetrain_gateway.admission import Caller, Demand
from wavetrain_gateway.errors import InvalidRequest
from wavetrain_gateway.messages import template_messages
from wavetrain_gateway.schemas import ChatRequest, CompletionRequest, SamplingFields
from wavetrain_gateway.settings import CapSettings
from wavetrain_gateway.upstream import Job

# OpenAI's, for completions that name no limit.
DEFAULT_MAX_TOKENS = 16
_CHARS_PER_TOKEN = 4
_AFFINITY_CHARS = 4096
_MAX_SALT_CHARS = 256
# Fields that are a sampling option of the same name, as they are.
_PLAIN = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a generation request asks for.

    Attributes:
        is_chat: answered as /v1/chat/completions does.
        prompts: each run on its own.
        options: the client's sampling options, `n` and the log-probabilities among them.
        max_tokens: as asked; 0 answers the prompt alone.
        num_top: top log-probabilities per token; None: no log-probabilities.
        is_echoed: the prompt comes before the output.
        is_repeatable: the same request has the same answer, so the response cache may keep it.
    """

    is_chat: bool
    model: str
    prompts: Sequence[Prompt]
    options: Mapping[str, Any]
    max_tokens: int
    num_choices: int
    num_generated: int
    num_top: int | None
    is_echoed: bool
    is_streamed: bool
    has_usage: bool
    has_running_usage: bool
    is_repeatable: bool
    priority: int | None
    cache_salt: str | None

    @property
    def num_prompt_tokens(self) -> int:
        """An estimate over all prompts."""
        return sum(estimate_tokens(prompt) for prompt in self.prompts)

    def demand(self) -> Demand:
        """What it would use, for the caller's limits."""
        num_sequences = len(self.prompts) * self.num_generated
        return Demand(
            model=self.model,
            num_prompt_tokens=self.num_prompt_tokens,
            max_output_tokens=max(1, self.max_tokens) * num_sequences,
            num_streams=num_sequences,
        )

    def jobs(self, caller: Caller, timeout_s: float, traceparent: str | None = None) -> list[Job]:
        """What to run: a job for each prompt."""
        return [self._job(prompt, caller, timeout_s, traceparent) for prompt in self.prompts]

    def fingerprint(self) -> str:
        """Equal for requests that ask for the same tokens; a hash, so that nothing of a prompt is kept."""
        shown = [self.is_chat, self.model, [_shown(prompt) for prompt in self.prompts], dict(self.options)]
        shown += [self.max_tokens, self.num_choices, self.num_top, self.is_echoed, self.cache_salt]
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()

    def _job(self, prompt: Prompt, caller: Caller, timeout_s: float, traceparent: str | None) -> Job:
        generation = GenerationRequest(
            prompt=prompt,
            options=self.options,
            timeout_s=timeout_s,
            priority=_priority(self.priority, caller),
            cache_salt=_salt(self.cache_salt, caller),
            traceparent=traceparent,
        )
        return Job(
            model=self.model,
            generation=generation,
            num_prompt_tokens=estimate_tokens(prompt),
            max_output_tokens=max(1, self.max_tokens) * self.num_generated,
            tier=caller.tier,
            affinity=_affinity(prompt),
        )


def plan_completion(body: CompletionRequest, caps: CapSettings) -> Plan:
    """Reads a completion request.

    Raises:
        InvalidRequest: a field is beyond its cap, or two do not go together.
    """
    prompts = _prompts(body, caps)
    num_choices = body.n or 1
    num_generated = max(num_choices, body.best_of or num_choices)
    is_streamed, is_echoed = bool(body.stream), bool(body.echo)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.best_of is not None and body.best_of < num_choices:
        raise InvalidRequest(f"best_of ({body.best_of}) is less than n ({num_choices}); raise it", param="best_of")
    if is_streamed and num_generated > num_choices:
        raise InvalidRequest("best_of cannot be streamed: the best is known at the end; leave one out", param="best_of")
    if max_tokens == 0 and not is_echoed:
        raise InvalidRequest("max_tokens must be at least 1, or 0 with echo", param="max_tokens")
    _check_caps(body, caps, num_generated, len(prompts), body.logprobs)
    extra: dict[str, Any] = {}
    if body.logprobs is not None:
        extra["logprobs"] = body.logprobs
        if is_echoed:
            extra["prompt_logprobs"] = body.logprobs
    elif num_generated > num_choices:
        extra["logprobs"] = 0  # whose sum tells which are the best
    return Plan(
        is_chat=False,
        prompts=prompts,
        options=_options(body, num_generated, max_tokens) | extra,
        max_tokens=max_tokens,
        num_choices=num_choices,
        num_generated=num_generated,
        num_top=body.logprobs,
        is_echoed=is_echoed,
        **_common(body),
    )


def plan_chat(body: ChatRequest, caps: CapSettings) -> Plan:
    """Reads a chat request.

    Raises:
        InvalidRequest: a field is beyond its cap, or two do not go together.
    """
    if body.tools and body.tool_choice != "none":
        raise InvalidRequest(
            "this server does not enforce tool calls; leave tools out, or send tool_choice 'none'",
            param="tools",
            code="unsupported_parameter",
        )
    if len(body.messages) > caps.max_messages:
        raise InvalidRequest(f"there are {len(body.messages)} messages; at most {caps.max_messages}", param="messages")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens and max_completion_tokens are the same; send one", param="max_tokens")
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens == 0 or body.max_tokens == 0:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    max_tokens = max_tokens or caps.max_output_tokens
    num_choices = body.n or 1
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    _check_caps(body, caps, num_choices, 1, num_top)
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    variables["add_generation_prompt"] = body.add_generation_prompt is not False
    prompt = ChatPrompt(messages=template_messages(body.messages), variables=variables)
    return Plan(
        is_chat=True,
        prompts=[prompt],
        options=_options(body, num_choices, max_tokens) | ({} if num_top is None else {"logprobs": num_top}),
        max_tokens=max_tokens,
        num_choices=num_choices,
        num_generated=num_choices,
        num_top=num_top,
        is_echoed=False,
        **_common(body),
    )


def estimate_tokens(prompt: Prompt) -> int:
    """How many tokens a prompt has: exact for token ids, else by its length."""
    if isinstance(prompt, ChatPrompt):
        num_chars = sum(len(str(message.get("content", ""))) + 16 for message in prompt.messages)
        return max(1, num_chars // _CHARS_PER_TOKEN)
    return max(1, len(prompt) // _CHARS_PER_TOKEN if isinstance(prompt, str) else len(prompt))


def _common(body: SamplingFields) -> dict[str, Any]:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true; leave it out", param="stream_options")
    return {
        "model": body.model,
        "is_streamed": bool(body.stream),
        "has_usage": bool(options and options.include_usage),
        "has_running_usage": bool(options and options.continuous_usage_stats),
        "is_repeatable": body.temperature == 0 or body.seed is not None,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
    }


def _options(body: SamplingFields, num_generated: int, max_tokens: int) -> dict[str, Any]:
    options: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    options |= {"max_tokens": max(1, max_tokens), "return_perf_metrics": True}
    if num_generated > 1:
        options["n"] = num_generated
    if body.stop:
        options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logit_bias:
        options["logit_bias"] = body.logit_bias
    if options.get("min_tokens", 0) > options["max_tokens"]:
        raise InvalidRequest(
            f"min_tokens ({options['min_tokens']}) is more than max_tokens ({max_tokens}); lower it", param="min_tokens"
        )
    return options


def _prompts(body: CompletionRequest, caps: CapSettings) -> list[Prompt]:
    prompt: Any = body.prompt
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = cast("list[Prompt]", [prompt] if is_one else prompt)
    if not all(prompts):
        raise InvalidRequest("a prompt is empty; send at least one token", param="prompt")
    if len(prompts) > caps.max_prompts:
        raise InvalidRequest(f"there are {len(prompts)} prompts; at most {caps.max_prompts} at once", param="prompt")
    return prompts


def _check_caps(
    body: SamplingFields, caps: CapSettings, num_generated: int, num_prompts: int, num_top: int | None
) -> None:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    checks = (
        ("n", num_generated, caps.max_choices, "choices"),
        ("n", num_generated * num_prompts, caps.max_sequences, "sequences (prompts times choices)"),
        ("stop", len(stop), caps.max_stop_strings, "stop strings"),
        ("stop", max(map(len, stop), default=0), caps.max_stop_chars, "characters in a stop string"),
        ("logit_bias", len(body.logit_bias or {}), caps.max_logit_biases, "biases"),
        ("logprobs", num_top or 0, caps.max_top_logprobs, "top log-probabilities"),
    )
    for name, value, most, what in checks:
        if value > most:
            raise InvalidRequest(f"{name}: there are {value} {what}; at most {most} are allowed", param=name)
    if not all(stop):
        raise InvalidRequest("stop must not hold empty strings", param="stop")


def _priority(asked: int | None, caller: Caller) -> int | None:
    """Lower is earlier; a key may have a best number that its requests cannot go below."""
    priority = caller.priority if asked is None else asked
    if caller.best_priority is None:
        return priority
    return caller.best_priority if priority is None else max(priority, caller.best_priority)


def _salt(asked: str | None, caller: Caller) -> str | None:
    """The caller's and the request's salt together, in a length the engine takes."""
    if not caller.cache_salt:
        return asked
    salt = f"{caller.cache_salt}:{asked or ''}"
    return salt if len(salt) <= _MAX_SALT_CHARS else hashlib.sha256(salt.encode("utf-8", "replace")).hexdigest()


def _affinity(prompt: Prompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return "\x1e".join(f"{item.get('role')}\x1f{item.get('content')}" for item in prompt.messages)[:_AFFINITY_CHARS]
    if isinstance(prompt, str):
        return prompt[:_AFFINITY_CHARS]
    # Four characters for each token id, so a chunk of the prefix index is as many tokens as a block of the engine.
    return array("i", prompt[: _AFFINITY_CHARS // 4]).tobytes().decode("latin-1")


def _shown(prompt: Prompt) -> Any:
    return list(prompt.to_json()) if isinstance(prompt, ChatPrompt) else prompt
