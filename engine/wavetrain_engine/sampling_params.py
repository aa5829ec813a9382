# SPDX-License-Identifier: Apache-2.0
"""How to choose tokens, and when to stop: one class, validated when it is made."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from wavetrain_engine.errors import InvalidSamplingParams

MAX_N = 128
MAX_LOGPROBS = 100
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_BAD_WORD_TOKENS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_LOGIT_BIAS = 65536
MAX_INT32 = 2**31 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Sampling parameters of one request, with vLLM's names and defaults.

    Attributes:
        n: sequences to generate from the prompt.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt
            or output (Keskar et al. 2019, CTRL, section 4.1).
        presence_penalty, frequency_penalty: subtracted from logits of output tokens, once or by count.
        logit_bias: added to the logits of these token ids.
        seed: same seed, same tokens, in any batch (where that is but for rounding, docs/decisions/0004 says); None
            draws a seed for the request.
        max_tokens: output tokens at most; None means as many as max_model_len leaves room for.
        min_tokens: no EOS, stop token or stop string before that many output tokens.
        stop: strings that end the output; matched on text, left out unless include_stop_str_in_output.
        stop_token_ids: tokens that end the output.
        bad_words: strings that must not be generated. Front ends turn them into bad_words_token_ids.
        bad_words_token_ids: token sequences whose last token is forbidden after the others.
        ignore_eos: go on after EOS.
        logprobs: top-k log-probabilities per output token, besides the sampled one's; None: none.
        prompt_logprobs: the same for prompt tokens.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: False for token ids only.

    Raises:
        InvalidSamplingParams: a value is out of range; the message names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        # As vLLM does: one string is a list of one, None is an empty list.
        for name in _LISTS:
            value: Any = getattr(self, name)
            if value is None:
                msgspec.structs.force_setattr(self, name, [])
            elif name == "stop" and isinstance(value, str):
                msgspec.structs.force_setattr(self, name, [value])
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise _type_error(name, "true or false", getattr(self, name))
        _check_int("n", self.n, 1, MAX_N)
        _check_float("temperature", self.temperature, 0.0, 1e6)
        _check_int("top_k", self.top_k, -1, MAX_INT32)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 1e3, exclusive_low=True)
        _check_float("presence_penalty", self.presence_penalty, -1e3, 1e3)
        _check_float("frequency_penalty", self.frequency_penalty, -1e3, 1e3)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_INT32)
        _check_int("min_tokens", self.min_tokens, 0, MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidSamplingParams(
                f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens}); lower it"
            )
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_lists(self)
        _check_bias(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """True where the likeliest token is taken."""
        return self.temperature == 0.0 or self.top_k == 1

    def replace(self, **changes: Any) -> SamplingParams:
        """Returns a copy with some parameters changed, validated anew."""
        return msgspec.structs.replace(self, **changes)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
        """Builds parameters from untrusted values; numbers and booleans may come as strings.

        Args:
            values: parameter name to value, as decoded from JSON.
            defaults: what holds where `values` is silent; the class's defaults when None.

        Raises:
            InvalidSamplingParams: an unknown name (the nearest known one is named), a wrong type, a
                value out of range.
        """
        changes = {name: _coerce(name, value) for name, value in values.items()}
        return cls(**changes) if defaults is None else msgspec.structs.replace(defaults, **changes)


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Decodes sampling parameters as vLLM's Triton backend takes them; `from_mapping` reads what they say.

    Raises:
        InvalidSamplingParams: not a JSON object.
    """
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSamplingParams("sampling_parameters is not valid JSON; send one JSON object") from error
    if not isinstance(values, dict):
        raise InvalidSamplingParams(f"sampling_parameters must be a JSON object, got {type(values).__name__}")
    return cast("dict[str, Any]", values)


_INTS = {"n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}
_FLOATS = {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_BOOLS = {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"}
_LISTS = {"stop", "stop_token_ids", "bad_words", "bad_words_token_ids"}
_KNOWN = _INTS | _FLOATS | _BOOLS | _LISTS | {"logit_bias"}
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs", "logit_bias", *_LISTS}


def _coerce(name: str, value: Any) -> Any:
    if name not in _KNOWN:
        nearest = difflib.get_close_matches(name, _KNOWN, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(sorted(_KNOWN))}"
        raise InvalidSamplingParams(f"unknown sampling parameter {name[:64]!r}{hint}")
    if value is None and name in _OPTIONAL:
        return None
    if name in _INTS:
        return _to_int(name, value)
    if name in _FLOATS:
        return _to_float(name, value)
    if name in _BOOLS:
        return _to_bool(name, value)
    if name == "logit_bias":
        return _to_bias(value)
    return _to_list(name, value)


def _to_int(name: str, value: Any) -> int:
    if isinstance(value, str):
        try:
            return int(value.strip())
        except ValueError:
            raise _type_error(name, "an integer", value) from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type_error(name, "an integer", value)
    return value


def _to_float(name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            return float(value.strip())
        except ValueError:
            raise _type_error(name, "a number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _type_error(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise _type_error(name, "a finite number", value) from None


def _to_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in {"true", "false"}:
        return value.strip().lower() == "true"
    raise _type_error(name, "true or false", value)


def _to_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _type_error("logit_bias", "an object of token id to number", value)
    items = cast("dict[Any, Any]", value)
    return {_to_int("logit_bias's token id", key): _to_float("logit_bias", bias) for key, bias in items.items()}


def _to_list(name: str, value: Any) -> list[Any]:
    if name == "stop" and isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _type_error(name, "a list", value)
    items = cast("list[Any]", value)
    if name == "stop_token_ids":
        return _to_ids(name, items)
    if name == "bad_words_token_ids":
        return [_to_ids(name, item) for item in items]
    if not all(isinstance(item, str) for item in items):
        raise _type_error(name, "a list of strings", value)
    return items


def _to_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _type_error(name, "lists of token ids", value)
    return [_to_int(name, item) for item in cast("list[Any]", value)]


def _type_error(name: str, expected: str, value: Any) -> InvalidSamplingParams:
    return InvalidSamplingParams(f"{name} must be {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:64])
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list a thousand levels deep
        return "something too large to show"


def _check_lists(params: SamplingParams) -> None:
    for name, most in (
        ("stop", MAX_STOP_STRINGS),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS),
        ("bad_words", MAX_BAD_WORDS),
        ("bad_words_token_ids", MAX_BAD_WORDS),
    ):
        values: Any = getattr(params, name)
        if not isinstance(values, list):
            raise _type_error(name, "a list", values)
        values = cast("list[Any]", values)
        if len(values) > most:
            raise InvalidSamplingParams(f"{name} has {len(values)} entries; at most {most} are allowed")
        for value in values:
            if name == "stop_token_ids":
                _check_int(name, value, 0, MAX_INT32)
            elif name == "bad_words_token_ids":
                _check_sequence(name, value)
            else:
                _check_text(name, value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidSamplingParams(f"{name} must hold non-empty strings")
    if len(value) > MAX_STOP_STRING_CHARS:
        raise InvalidSamplingParams(
            f"{name} has a string of {len(value)} characters; at most {MAX_STOP_STRING_CHARS} are allowed"
        )


def _check_sequence(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise _type_error(name, "a list of lists of token ids", value)
    token_ids = cast("list[Any]", value)
    if len(token_ids) > MAX_BAD_WORD_TOKENS:
        raise InvalidSamplingParams(
            f"{name} has a sequence of {len(token_ids)} tokens; at most {MAX_BAD_WORD_TOKENS} are allowed"
        )
    for token_id in token_ids:
        _check_int(name, token_id, 0, MAX_INT32)


def _check_bias(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise _type_error("logit_bias", "an object of token id to number", value)
    biases = cast("dict[Any, Any]", value)
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidSamplingParams(f"logit_bias has {len(biases)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    for token_id, bias in biases.items():
        _check_int("logit_bias's token id", token_id, 0, MAX_INT32)
        _check_float(f"logit_bias[{token_id}]", bias, -1e6, 1e6)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type_error(name, "an integer", value)
    if not low <= value <= high:
        raise InvalidSamplingParams(f"{name} must be between {low} and {high}, got {_shown(value)}")


def _check_float(name: str, value: Any, low: float, high: float, *, exclusive_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _type_error(name, "a number", value)
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        is_finite = False
    if not is_finite:
        raise _type_error(name, "a finite number", value)
    if value > high or value < low or (exclusive_low and value == low):
        left = "more than" if exclusive_low else "at least"
        raise InvalidSamplingParams(f"{name} must be {left} {low:g} and at most {high:g}, got {value:g}")
