# SPDX-License-Identifier: Apache-2.0
"""Prompts and word lists as text, for `tokenizer` and `llm`: bounded first, then tokenized."""

from __future__ import annotations

import math
from typing import Any

from wavetrain_engine.errors import PromptTooLong, RequestError
from wavetrain_engine.sampling_params import MAX_BAD_WORDS, MAX_STOP_STRING_CHARS
from wavetrain_engine.serving.row_inputs import merge_params, stop_word_params
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.text.bad_words import bad_words_token_ids
from wavetrain_engine.text.tokenizer import Tokenizer

_MAX_UTF8_BYTES_PER_CHAR = 4
_WORD_INPUTS = frozenset({"stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights"})


def encode_prompt(
    tensors: RequestTensors, row: int, tokenizer: Tokenizer, max_model_len: int, *, add_special_tokens: bool = True
) -> tuple[str, list[int]]:
    """Returns a row's prompt and its token ids, with those that the tokenizer puts around a text or without.

    Raises:
        RequestError: it is empty, or not UTF-8.
        PromptTooLong: it surely has more than max_model_len tokens; no work was done on it.
    """
    raw = tensors.scalar("text_input", row)
    if not raw:
        raise RequestError("text_input is empty; send at least one character")
    if len(raw) > max_model_len * tokenizer.max_chars_per_token * _MAX_UTF8_BYTES_PER_CHAR:
        raise PromptTooLong(f"the prompt has {len(raw)} bytes, far more than {max_model_len} tokens; shorten it")
    text = tensors.text("text_input", row) or ""
    return text, tokenizer.encode(text, add_special_tokens, max_tokens=max_model_len)


def word_inputs(tensors: RequestTensors, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Stop words, bad words and biased words of a row, as sampling parameters.

    Raises:
        RequestError: there are too many, or biases and their words differ in number.
    """
    if _WORD_INPUTS.isdisjoint(tensors.names):
        return {}
    return merge_params(
        stop_word_params(tensors.texts("stop_words", row), tokenizer),
        {"bad_words_token_ids": bad_word_ids(tensors, row, tokenizer)},
        _with_bias(biased_token_ids(tensors, row, tokenizer)),
    )


def bad_word_ids(tensors: RequestTensors, row: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The token sequences of a row's `bad_words`.

    Raises:
        RequestError: there are too many, or one is too long.
    """
    words = tensors.texts("bad_words", row)
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(f"there are {len(words)} bad words; at most {MAX_BAD_WORDS} are allowed")
    if any(len(word) > MAX_STOP_STRING_CHARS for word in words):
        raise RequestError(f"a bad word has more than {MAX_STOP_STRING_CHARS} characters; shorten it")
    return bad_words_token_ids(tokenizer, words)


def biased_token_ids(tensors: RequestTensors, row: int, tokenizer: Tokenizer) -> dict[int, float]:
    """What to add to which token's logit: each word's bias counts for all of its tokens.

    Raises:
        RequestError: words and biases differ in number, or a bias is not finite.
    """
    words = tensors.texts("embedding_bias_words", row)
    weights = tensors.row("embedding_bias_weights", row)
    biases: list[float] = [] if weights is None else weights.reshape(-1).tolist()
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(f"there are {len(words)} embedding_bias_words; at most {MAX_BAD_WORDS} are allowed")
    # Where there are no words at all, a lone weight is what clients send for "none".
    if words and len(words) != len(biases):
        raise RequestError(
            f"embedding_bias_words has {len(words)} entries and embedding_bias_weights {len(biases)}; send as many"
        )
    total: dict[int, float] = {}
    for word, bias in zip(words, biases, strict=False):
        if not math.isfinite(bias):
            raise RequestError("embedding_bias_weights must be finite")
        for token_id in tokenizer.encode(word, add_special_tokens=False):
            total[token_id] = total.get(token_id, 0.0) + bias
    return total


def _with_bias(biases: dict[int, float]) -> dict[str, Any]:
    return {"logit_bias": biases} if biases else {}
