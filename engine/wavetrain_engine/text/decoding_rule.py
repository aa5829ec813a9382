# SPDX-License-Identifier: Apache-2.0
"""How a tokenizer turns tokens into text, read from the decoder of its tokenizer.json.

Two rules cover the tokenizers of the models we serve, and for them a token is a piece that can be
looked up: `BYTE_LEVEL` (GPT-2's: a piece is bytes, the text is their UTF-8) and `PIECES`
(SentencePiece's: a piece is text or one raw byte). Anything else is `WINDOW`: the tokenizers library
decodes a window of tokens, which is right but slower.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from tokenizers import Tokenizer as Backend


class DecodingKind(Enum):
    """Which state machine follows the tokens."""

    BYTE_LEVEL = "byte_level"
    PIECES = "pieces"
    WINDOW = "window"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingRule:
    """What the decoder does, as far as a state machine has to know.

    Attributes:
        token_replacements: applied to the text of a token that is not a byte token.
        run_replacements: applied to the text of a run of byte tokens too.
        has_byte_tokens: `<0xE2>` is a byte; the bytes of neighbouring byte tokens are one run.
        stripped_char: the text loses this character where it is its very first one.
        dropped_char: the first token loses every such character.
    """

    kind: DecodingKind
    token_replacements: tuple[tuple[str, str], ...] = ()
    run_replacements: tuple[tuple[str, str], ...] = ()
    has_byte_tokens: bool = False
    stripped_char: str = ""
    dropped_char: str = ""

    @classmethod
    def of(cls, backend: Backend) -> DecodingRule:
        """Reads the rule of a tokenizer. Never fails: what it does not know is `WINDOW`."""
        decoder: Any = backend.decoder
        if decoder is None:
            return cls(kind=DecodingKind.WINDOW)
        steps = _flatten(json.loads(decoder.__getstate__()))
        names = [step.get("type") for step in steps]
        if names in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return cls(kind=DecodingKind.BYTE_LEVEL)
        return _pieces_rule(steps) or cls(kind=DecodingKind.WINDOW)


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step.get("type") != "Sequence":
        return [step]
    inner = cast("list[dict[str, Any]]", step.get("decoders", []))
    return [leaf for item in inner for leaf in _flatten(item)]


def _pieces_rule(steps: list[dict[str, Any]]) -> DecodingRule | None:
    before: list[tuple[str, str]] = []
    after: list[tuple[str, str]] = []
    has_byte_tokens = is_fused = False
    stripped_char = dropped_char = ""
    for step in steps:
        kind = step.get("type")
        if stripped_char and kind != "Fuse":
            return None  # what follows the strip would see another text
        if kind == "Replace" and "String" in step["pattern"]:
            pattern = step["pattern"]["String"]
            if is_fused and len(pattern) != 1:
                return None  # may match across tokens
            (after if has_byte_tokens or is_fused else before).append((pattern, step["content"]))
        elif kind == "Metaspace" and not is_fused:
            (after if has_byte_tokens else before).append((step["replacement"], " "))
            dropped_char = "" if step["prepend_scheme"] == "never" else step["replacement"]
        elif kind == "ByteFallback" and not has_byte_tokens and not is_fused:
            has_byte_tokens = True
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused and step["stop"] == 0 and step["start"] <= 1 and not dropped_char:
            stripped_char = step["content"] if step["start"] else ""
        else:
            return None
    if dropped_char and (before + after)[0][0] != dropped_char:
        return None  # an earlier replacement may make or take the dropped character
    return DecodingRule(
        kind=DecodingKind.PIECES,
        token_replacements=(*before, *after),
        run_replacements=tuple(after),
        has_byte_tokens=has_byte_tokens,
        stripped_char=stripped_char,
        dropped_char=dropped_char,
    )
