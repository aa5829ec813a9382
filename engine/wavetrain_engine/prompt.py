# SPDX-License-Identifier: Apache-2.0
"""The prompts that callers of the offline API may give, in one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from wavetrain_engine.errors import RequestError
from wavetrain_engine.text.tokenizer import Tokenizer

PromptLike = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or one of them in a dict under `prompt` or `prompt_token_ids`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text they came from where there was one."""

    text: str | None
    token_ids: list[int]

    @classmethod
    def parse(cls, value: PromptLike, tokenizer: Tokenizer | None, *, max_tokens: int) -> Prompt:
        """Encodes a text, or takes token ids as they are.

        Raises:
            RequestError: it is none of the kinds of prompt, not valid Unicode, or text without a tokenizer.
            PromptTooLong: a text that surely has more than `max_tokens` tokens.
        """
        if isinstance(value, Mapping):
            unknown = set(value) - {"prompt", "prompt_token_ids"}
            if unknown or len(value) != 1:
                raise RequestError(
                    "a prompt dict has exactly one key, prompt or prompt_token_ids; "
                    f"got {', '.join(sorted(map(str, value))) or 'none'}"
                )
            value = next(iter(value.values()))
        if isinstance(value, str):
            if tokenizer is None:
                raise RequestError("there is no tokenizer (skip_tokenizer_init); give the prompt as token ids")
            return cls(value, tokenizer.encode(value, max_tokens=max_tokens))
        if not _is_token_ids(value):
            raise RequestError(f"a prompt is a string or a list of token ids, got {type(value).__name__}")
        return cls(None, list(value))


def listed_prompts(prompts: Any) -> list[PromptLike]:
    """Returns the prompts as a list: a string, a list of numbers or a dict is one prompt.

    Raises:
        RequestError: neither a prompt nor a list.
    """
    if isinstance(prompts, str | Mapping):
        return [cast("PromptLike", prompts)]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are strings or lists of token ids, got {type(prompts).__name__}")
    items = cast("Sequence[PromptLike]", prompts)
    if items and _is_token_ids(items):
        return [items]
    return list(items)


def _is_token_ids(value: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    items = cast("Sequence[object]", value)
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)
