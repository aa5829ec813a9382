# SPDX-License-Identifier: Apache-2.0
"""The tokens of a GGUF file, and what it says about its tokenizer; without the library that tokenizes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.metadata import Metadata, shown
from wavetrain_engine.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizerRule

TOKENS = "tokenizer.ggml.tokens"
_KIND = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_TYPES = "tokenizer.ggml.token_type"
_CHAT_TEMPLATE = "tokenizer.chat_template"
NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
SENTENCEPIECE_DEFAULTS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# Tokens that end an answer, whatever the ids of a file say: converters know one end, chat models may have several.
_END_TEXTS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>",
        "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip


BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
_MAX_TOKEN_CHARS = 4096


class TokenType(IntEnum):
    """What kind of token each is, by the format's numbers."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All tokens, by id."""

    texts: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: Metadata) -> Vocabulary:
        """Reads them.

        Raises:
            CheckpointError: there are none, or they are not what tokens can be.
        """
        if TOKENS not in metadata:
            raise CheckpointError(
                f"{metadata.where} has no tokenizer ({TOKENS}); serve token ids only with --skip-tokenizer-init"
            )
        texts = metadata.strings(TOKENS)
        types = metadata.integers(_TYPES) if _TYPES in metadata else [int(TokenType.NORMAL)] * len(texts)
        if len(types) != len(texts):
            raise metadata.wrong(_TYPES, f"{len(types)} types for {len(texts)} tokens")
        if max(map(len, texts), default=0) > _MAX_TOKEN_CHARS:
            raise metadata.wrong(TOKENS, f"a token has more than {_MAX_TOKEN_CHARS} characters")
        # What converters fill the vocabulary up with, to as many tokens as the embedding has rows.
        while texts and types[-1] == TokenType.UNUSED and texts[-1] == f"[PAD{len(texts) - 1}]":
            texts.pop()
            types.pop()
        return cls(texts, types)

    def ids(self, metadata: Metadata) -> dict[str, int]:
        """Returns text → id."""
        ids = {text: index for index, text in enumerate(self.texts)}
        if len(ids) != len(self.texts):
            twice = next(text for index, text in enumerate(self.texts) if ids[text] != index)
            raise metadata.wrong(TOKENS, f"the token {shown(twice)} occurs twice")
        return ids

    def text_of(self, metadata: Metadata, key: str, default: int | None) -> str | None:
        """Returns the text of the token whose id is the value of `key`."""
        index = metadata.integer(key) if key in metadata else default
        if index is None or (key not in metadata and index >= len(self.texts)):
            return None
        if not 0 <= index < len(self.texts):
            raise metadata.wrong(key, f"{index} is no id of {len(self.texts)} tokens")
        return self.texts[index]


def tokenizer_kind(metadata: Metadata) -> str:
    """Returns which of the kinds that are served a file's tokenizer is of: BYTE_LEVEL or SENTENCEPIECE.

    Raises:
        CheckpointError: it is of another.
    """
    kind = metadata.string(_KIND)
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise metadata.wrong(
            _KIND,
            f"tokenizer {shown(kind)} is not supported, only {BYTE_LEVEL} and {SENTENCEPIECE} are; serve token ids "
            "with --skip-tokenizer-init",
        )
    return kind


def pre_tokenizer_rule(metadata: Metadata) -> PreTokenizerRule:
    """Returns how a byte-level tokenizer cuts a text into words.

    Raises:
        CheckpointError: the file does not say, or names a way that is not known here.
    """
    name = metadata.optional_string(_PRE)
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    why = "it is missing" if name is None else f"pre-tokenizer {shown(name)} is not supported"
    raise metadata.wrong(
        _PRE,
        f"{why}; supported are {', '.join(sorted(PRE_TOKENIZERS))}. Convert the model with a newer llama.cpp, or serve "
        "token ids with --skip-tokenizer-init",
    )


def check_tokenizer(metadata: Metadata) -> None:
    """Checks that a file has a tokenizer of a kind that is served, without building it.

    Raises:
        CheckpointError: it has none, or another.
    """
    Vocabulary.read(metadata)
    if tokenizer_kind(metadata) == BYTE_LEVEL:
        pre_tokenizer_rule(metadata)


def end_token_ids(metadata: Metadata) -> list[int]:
    """Returns the ids of all tokens that end an answer, the file's own first.

    Raises:
        CheckpointError: an id or a token is not what it can be.
    """
    ids = [metadata.integer(key) for key in _END_KEYS if key in metadata]
    if TOKENS in metadata:
        if not ids and metadata.string(_KIND) == SENTENCEPIECE:
            ids = [SENTENCEPIECE_DEFAULTS["eos_token"]]
        ids += [index for index, text in enumerate(Vocabulary.read(metadata).texts) if text in _END_TEXTS]
    return list(dict.fromkeys(ids))


def chat_templates(metadata: Metadata) -> dict[str, str]:
    """Returns Jinja source by name, `default` being the usual one; empty where there is none.

    Raises:
        CheckpointError: one is no string.
    """
    templates: dict[str, str] = {}
    if _CHAT_TEMPLATE in metadata:
        templates["default"] = metadata.string(_CHAT_TEMPLATE)
        for key in metadata.keys_of(f"{_CHAT_TEMPLATE}."):
            templates[key.removeprefix(f"{_CHAT_TEMPLATE}.")] = metadata.string(key)
    return templates
