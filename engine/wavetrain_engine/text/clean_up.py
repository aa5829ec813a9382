# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's `clean_up_tokenization_spaces`: " ." becomes "." and so on, whole or chunk by chunk.

The replacements only ever take spaces away, and each begins with one and is at most four characters
long. So a border between two characters is safe (nothing is replaced across it, at any stage) when
the character before it is in no pattern, or when no space is among the four before it.
"""

from __future__ import annotations

_REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_PATTERN_CHARS = frozenset("".join(pattern for pattern, _ in _REPLACEMENTS))
_LONGEST_PATTERN = 4


def clean_up(text: str) -> str:
    """Returns the text as Hugging Face cleans it."""
    for pattern, content in _REPLACEMENTS:
        text = text.replace(pattern, content)
    return text


class CleanUpFilter:
    """The same on a text that comes in chunks: the results concatenate to `clean_up` of the whole."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = ""

    def push(self, text: str) -> str:
        """Returns the cleaned text that later chunks cannot change."""
        buffer = self.held + text
        border = len(buffer)
        while border and not _is_safe(buffer, border):
            border -= 1
        self.held = buffer[border:]
        return clean_up(buffer[:border])

    def flush(self) -> str:
        """Returns the rest; nothing follows it."""
        text, self.held = self.held, ""
        return clean_up(text)


def _is_safe(buffer: str, border: int) -> bool:
    if buffer[border - 1] not in _PATTERN_CHARS:
        return True
    return " " not in buffer[max(0, border - _LONGEST_PATTERN) : border]
