# SPDX-License-Identifier: Apache-2.0
"""The prompt of `llm`, in one of three forms: text, token ids, or messages for the checkpoint's chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

from wavetrain_engine.errors import PromptTooLong, RequestError
from wavetrain_engine.serving.prompts import encode_prompt
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer

TOKEN_IDS_INPUT = "input_ids"
MESSAGES_INPUT = "messages"
VARIABLES_INPUT = "template_variables"

# Of one rendering. Nobody's own messages need more than a few milliseconds, and others wait behind it.
TEMPLATE_TIMEOUT_S = 2.0
_MAX_MESSAGES = 4096
_MAX_VARIABLES = 64
# Given by the template's caller, so not the client's to give.
_RESERVED = ("messages", "source")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids; its text is made only where it is asked for."""

    token_ids: list[int]
    text: str | None = None


class LlmPrompts:
    """Reads prompts. Thread-safe, as tokenizer and template are."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_model_len = max_model_len

    def read(self, tensors: RequestTensors, row: int = 0, *, add_special_tokens: bool = True) -> Prompt:
        """Returns a row's prompt; `add_special_tokens` is about text, as a template has its own.

        Raises:
            RequestError: it is empty, given twice, no valid JSON, or the template refuses it.
            PromptTooLong: it surely has more than max_model_len tokens.
        """
        given = [name for name in (TOKEN_IDS_INPUT, MESSAGES_INPUT) if tensors.row(name, row) is not None]
        if tensors.scalar("text_input", row):
            given.append("text_input")
        if len(given) > 1:
            raise RequestError(f"{given[0]} and {given[-1]} both give the prompt; send one of them, the other empty")
        if MESSAGES_INPUT in given:
            return self._read_messages(tensors, row)
        if VARIABLES_INPUT in tensors.names:
            raise RequestError(f"{VARIABLES_INPUT} is of use with {MESSAGES_INPUT} only; leave it out")
        if TOKEN_IDS_INPUT in given:
            return Prompt(tensors.token_ids(TOKEN_IDS_INPUT, row) or [])
        text, token_ids = encode_prompt(
            tensors, row, self._tokenizer, self._max_model_len, add_special_tokens=add_special_tokens
        )
        return Prompt(token_ids, text)

    def text_of(self, prompt: Prompt) -> str:
        """The prompt's text, as `exclude_input_in_output = false` puts it before the output."""
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def close(self) -> None:
        """Ends the template's process. Idempotent."""
        if self._template is not None:
            self._template.close()

    def _read_messages(self, tensors: RequestTensors, row: int) -> Prompt:
        if self._template is None:
            raise RequestError(
                "the checkpoint has no chat template, so it takes no messages; send a prompt, or serve a checkpoint "
                "with a chat_template.jinja"
            )
        messages = _parse(MESSAGES_INPUT, tensors.text(MESSAGES_INPUT, row) or "", list)
        variables = _parse(VARIABLES_INPUT, tensors.text(VARIABLES_INPUT, row) or "{}", dict)
        if not messages or len(messages) > _MAX_MESSAGES or not all(isinstance(item, dict) for item in messages):
            raise RequestError(f"{MESSAGES_INPUT} must hold between 1 and {_MAX_MESSAGES} objects")
        if len(variables) > _MAX_VARIABLES:
            raise RequestError(f"{VARIABLES_INPUT} has {len(variables)} entries; at most {_MAX_VARIABLES} are allowed")
        for name in (*_RESERVED, *self._tokenizer.named_tokens):
            if name in variables:
                raise RequestError(f"{VARIABLES_INPUT} must not give {name!r}; it is the server's")
        text = self._template.render(messages, **variables)
        if not text:
            raise RequestError("the chat template makes nothing of these messages; send others")
        limit = self._max_model_len * self._tokenizer.max_chars_per_token
        if len(text) > limit:
            raise PromptTooLong(f"the prompt has {len(text)} characters, far more than {self._max_model_len} tokens")
        return Prompt(self._tokenizer.encode(text, add_special_tokens=False), text)


def _parse(name: str, text: str, kind: type[Any]) -> Any:
    expected = "array" if kind is list else "object"
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"{name} is not valid JSON; send one JSON {expected}") from None
    if not isinstance(value, kind):
        raise RequestError(f"{name} must be a JSON {expected}")
    return cast("Any", value)
