# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file, as a `tokenizers` backend and the settings that lie beside a tokenizer.json.

Two kinds are served: `gpt2`, byte-level BPE with merges, and `llama`, SentencePiece's BPE, whose merges follow from the
scores of its tokens. Where a file is silent, what llama.cpp does is meant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.metadata import Metadata, shown
from wavetrain_engine.gguf.pre_tokenizers import PreTokenizerRule
from wavetrain_engine.gguf.vocabulary import (
    BYTE_LEVEL,
    NAMED_TOKENS,
    SENTENCEPIECE_DEFAULTS,
    TOKENS,
    TokenType,
    Vocabulary,
    pre_tokenizer_rule,
    tokenizer_kind,
)

_SCORES = "tokenizer.ggml.scores"
_MERGES = "tokenizer.ggml.merges"
_SPACE = "▁"
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """What a file's tokenizer is.

    Attributes:
        config: what tokenizer_config.json would say.
    """

    backend: Backend
    config: dict[str, Any]

    @classmethod
    def read(cls, metadata: Metadata) -> GgufTokenizer:
        """Builds it.

        Raises:
            CheckpointError: there is none, or it is of a kind that is not served, or its parts do not fit together.
        """
        vocabulary = Vocabulary.read(metadata)
        try:
            if tokenizer_kind(metadata) == BYTE_LEVEL:
                rule = pre_tokenizer_rule(metadata)
                backend, adds_bos, defaults = _byte_level(metadata, vocabulary, rule), rule.adds_bos, {}
            else:
                adds_bos, defaults = True, SENTENCEPIECE_DEFAULTS
                backend = _sentencepiece(metadata, vocabulary)
            _add_tokens(backend, vocabulary)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise metadata.wrong(TOKENS, f"the tokenizer cannot be built: {shown(str(error))}") from error
        config: dict[str, Any] = {
            "add_bos_token": metadata.boolean("tokenizer.ggml.add_bos_token", adds_bos),
            "add_eos_token": metadata.boolean("tokenizer.ggml.add_eos_token", False),
        }
        for name, key in NAMED_TOKENS.items():
            token = vocabulary.text_of(metadata, key, defaults.get(name))
            if token is not None:
                config[name] = token
        for added in ("bos", "eos"):
            if config[f"add_{added}_token"] and f"{added}_token" not in config:
                raise metadata.wrong(
                    f"tokenizer.ggml.add_{added}_token", f"there is no tokenizer.ggml.{added}_token_id"
                )
        return cls(backend=backend, config=config)


def _byte_level(metadata: Metadata, vocabulary: Vocabulary, rule: PreTokenizerRule) -> Backend:
    merges: list[tuple[str, str]] = []
    for merge in metadata.strings(_MERGES):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise metadata.wrong(_MERGES, f"merge {len(merges)}, {shown(merge)}, is no pair of tokens")
        merges.append((left, right))
    model = models.BPE(vocab=vocabulary.ids(metadata), merges=merges, ignore_merges=rule.ignores_merges)
    backend = cast("Any", Backend(model))
    if rule.is_composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(rule: PreTokenizerRule) -> Any:
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.has_digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.has_gpt2_words)
    return cast("Any", pre_tokenizers).Sequence([*steps, byte_level]) if steps else byte_level


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary) -> Backend:
    scores = metadata.floats(_SCORES)
    if len(scores) < len(vocabulary.texts):
        raise metadata.wrong(_SCORES, f"{len(scores)} scores for {len(vocabulary.texts)} tokens")
    if not all(map(math.isfinite, scores)):
        raise metadata.wrong(_SCORES, "a score is no finite number")
    ids = vocabulary.ids(metadata)
    unknown = vocabulary.text_of(metadata, NAMED_TOKENS["unk_token"], SENTENCEPIECE_DEFAULTS["unk_token"])
    model = models.BPE(
        vocab=ids, merges=_merges(vocabulary, ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = cast("Any", Backend(model))
    has_prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", True)
    marks = [normalizers.Replace(" ", _SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *marks] if has_prefix else marks)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = cast("Any", decoders).Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend


def _merges(vocabulary: Vocabulary, ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns every way to make a token of two others, the token of the best score first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, kind, score in zip(vocabulary.texts, vocabulary.types, scores, strict=False):
        if kind not in (TokenType.NORMAL, TokenType.UNDEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(backend: Any, vocabulary: Vocabulary) -> None:
    """Tells the backend which tokens are found in a text before it is cut and merged."""
    special: list[AddedToken] = []
    other: list[AddedToken] = []
    for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True):
        if kind in _SPECIAL and text:
            special.append(AddedToken(text, special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED and text:
            other.append(AddedToken(text, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(other)
