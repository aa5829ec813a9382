# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities as OpenAI's two APIs show them. A position's first token is the one that is there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from wavetrain_client import Logprob

Position: TypeAlias = Mapping[int, Logprob]
_REPLACEMENT = "\ufffd"


def chat_logprobs(positions: Sequence[Position], num_top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content: list[dict[str, Any]] = []
    for position in positions:
        sampled = next(iter(position.values()))
        top = [_chat_entry(entry) for entry in _top(position, num_top)]
        content.append({**_chat_entry(sampled), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(positions: Sequence[Position], num_top: int, first_offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion.

    Args:
        first_offset: where the first token's text begins in the choice's text.
    """
    tokens: list[str] = []
    offsets: list[int] = []
    offset = first_offset
    for position in positions:
        text = next(iter(position.values())).decoded_token or ""
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [_number(next(iter(position.values())).logprob) for position in positions],
        "top_logprobs": [_top_by_text(position) for position in positions] if num_top else None,
        "text_offset": offsets,
    }


def _top(position: Position, num_top: int) -> list[Logprob]:
    """The likeliest tokens, best first; the one that is there only where it is among them."""
    ranked = [entry for entry in position.values() if entry.rank is not None and entry.rank <= num_top]
    return sorted(ranked, key=lambda entry: entry.rank or 0)


def _top_by_text(position: Position) -> dict[str, float] | None:
    """Token text to log-probability, the token that is there among them; null where nothing is known.

    Tokens of one text (parts of characters) are shown as the likeliest of them, so a token that is there and below
    its position's maximum is never taken for the model's own choice.
    """
    if any(math.isnan(entry.logprob) for entry in position.values()):
        return None
    found: dict[str, float] = {}
    for entry in position.values():
        text = entry.decoded_token or ""
        found[text] = max(entry.logprob, found.get(text, entry.logprob))
    return found


def _chat_entry(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    # Part of a character has bytes that its text does not show; none is better than wrong ones.
    raw = None if _REPLACEMENT in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": _number(entry.logprob), "bytes": raw}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
