# SPDX-License-Identifier: Apache-2.0
"""The bodies of requests: every field there is, its type and its bounds. What is not here is refused by its name.

Bounds that gateway.toml sets are checked in `caps.py`; those here hold for everybody. Types are strict: "5" and true
are no numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from wavetrain_gateway.messages import Message

MAX_LIST = 1 << 20
MAX_PROMPTS = 4096
_MAX_INT32 = 2**31 - 1
_MAX_BIAS = 100

TokenId: TypeAlias = Annotated[int, Field(ge=0, le=_MAX_INT32)]
# fail_fast: a list of a million wrong elements is one error, not a million.
TokenIds: TypeAlias = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_LIST)]
_Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
_Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_LIST)]
_IdLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
Prompt: TypeAlias = Union[str, _Texts, _Ids, _IdLists]  # noqa: UP007 - read at run time by pydantic, on Python 3.10 too
_Finite = Annotated[float, Field(allow_inf_nan=False)]


def check_prompt(value: object) -> Any:
    """Returns a prompt that has one of the four forms, looked at with as little work as its size allows.

    Raises:
        ValueError: it has none of them.
    """
    if isinstance(value, str):
        return value
    items = cast("list[Any]", value) if isinstance(value, list) else []
    # Types as they are: true is no token id.
    kinds = set(map(type, items[:MAX_LIST]))
    if kinds == {int} and _are_token_ids(items):
        return items
    is_list_of_lists = kinds == {list} and len(items) <= MAX_PROMPTS
    if is_list_of_lists and all(set(map(type, item)) <= {int} and _are_token_ids(item) for item in items):
        return items
    if kinds == {str} and len(items) <= MAX_PROMPTS:
        return items
    raise ValueError("it has none of the four forms")


def _are_token_ids(items: list[int]) -> bool:
    return len(items) <= MAX_LIST and min(items, default=0) >= 0 and max(items, default=0) <= _MAX_INT32


def check_biases(value: object) -> dict[int, float] | None:
    """Returns biases by token id.

    Raises:
        ValueError: an id or a bias is none.
    """
    if value is None:
        return None
    items = cast("dict[Any, Any]", value) if isinstance(value, dict) else {"": 0}
    for name, bias in items.items():
        if not (isinstance(name, str) and name.isascii() and name.isdigit() and len(name) <= 10):
            raise ValueError("it must be an object of token ids to numbers")
        if type(bias) not in (int, float) or not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise ValueError(f"a bias must be a number between {-_MAX_BIAS} and {_MAX_BIAS}")
    return {int(name): float(bias) for name, bias in items.items()}


class StreamOptions(BaseModel):
    """What a stream has beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(BaseModel):
    """What both kinds of generation take.

    Attributes:
        max_sizes: lists and objects and the most they may hold, checked before anything else looks at them.
        refused: fields of OpenAI's or vLLM's that are known and not supported, and why.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_sizes: ClassVar[dict[str, int]] = {
        "logit_bias": 4096,
        "stop": 64,
        "stop_token_ids": 1024,
        "bad_words": 1024,
        "stream_options": 8,
    }
    refused: ClassVar[dict[str, str]] = {}

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_INT32)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT32)] | None = None
    temperature: Annotated[_Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INT32)] | None = None
    min_p: Annotated[_Finite, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    bad_words: Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    presence_penalty: Annotated[_Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[_Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[_Finite, Field(gt=0, le=1000)] | None = None
    logit_bias: Annotated[
        dict[int, float] | None, PlainValidator(check_biases, json_schema_input_type=dict[str, float] | None)
    ] = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-_MAX_INT32, le=_MAX_INT32)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


_NO_GRAMMAR = "this server does not constrain its output to a grammar or schema; leave it out and check the text"
_REFUSED = {
    "audio": "the models here take and make text only",
    "functions": "this server does not enforce tool calls; leave it out",
    "function_call": "this server does not enforce tool calls; leave it out",
    "guided_json": _NO_GRAMMAR,
    "guided_regex": _NO_GRAMMAR,
    "guided_choice": _NO_GRAMMAR,
    "guided_grammar": _NO_GRAMMAR,
    "structured_outputs": _NO_GRAMMAR,
    "metadata": "nothing is stored here; leave it out",
    "prediction": "predicted outputs are not supported; leave it out",
    "prompt_cache_key": "prefixes are cached by themselves; leave it out, or keep them apart with cache_salt",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "reasoning_effort": "the models here have no such setting; leave it out",
    "use_beam_search": "there is no beam search; leave it out",
    "verbosity": "the models here have no such setting; leave it out",
    "web_search_options": "this server searches nothing; leave it out",
}


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    max_sizes: ClassVar[dict[str, int]] = {**SamplingFields.max_sizes, "prompt": MAX_LIST}
    refused: ClassVar[dict[str, str]] = {
        **_REFUSED,
        "suffix": "the models here do not fill text in; leave it out",
        "messages": "messages go to /v1/chat/completions",
        "tools": "tools go to /v1/chat/completions",
        "response_format": _NO_GRAMMAR,
    }

    prompt: Annotated[Prompt, PlainValidator(check_prompt, json_schema_input_type=Prompt)]
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None


class ResponseFormat(BaseModel):
    """What the output should be: text is what it is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    max_sizes: ClassVar[dict[str, int]] = {
        **SamplingFields.max_sizes,
        "messages": 65_536,
        "tools": 128,
        "chat_template_kwargs": 32,
        "modalities": 4,
    }
    refused: ClassVar[dict[str, str]] = {
        **_REFUSED,
        "prompt": "a prompt goes to /v1/completions",
        "best_of": "best_of is for /v1/completions; use n",
        "echo": "echo is for /v1/completions",
        "suffix": "the models here do not fill text in; leave it out",
        "chat_template": "the checkpoint's chat template is used; a request cannot bring its own",
    }

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    add_generation_prompt: bool | None = None


class TokenizeRequest(BaseModel):
    """POST /tokenize: of a prompt, or of messages. Without a model it is the only one there is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    max_sizes: ClassVar[dict[str, int]] = {"messages": 65_536, "chat_template_kwargs": 32}
    refused: ClassVar[dict[str, str]] = {"return_token_strs": "ask /detokenize for the text of tokens"}

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize. Without a model it is the only one there is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    max_sizes: ClassVar[dict[str, int]] = {"tokens": MAX_LIST}
    refused: ClassVar[dict[str, str]] = {}

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_LIST)]
