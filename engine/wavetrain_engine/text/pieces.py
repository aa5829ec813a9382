# SPDX-License-Identifier: Apache-2.0
"""What each token adds to the text, looked up once per token and then remembered.

Filling a table twice from two threads does no harm: both write the same piece. Looking up an id that
cannot be one (negative, 2**32 or more) raises RequestError.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

from tokenizers import Tokenizer as Backend

from wavetrain_engine.errors import RequestError
from wavetrain_engine.text.decoding_rule import DecodingRule

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest moves to U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(moved)}


_ALPHABET = _byte_level_alphabet()


class BytePieces(dict[int, bytes]):
    """Token id to bytes, for byte-level tokenizers; b"" for skipped and unknown ids."""

    def __init__(self, backend: Backend, skipped_ids: AbstractSet[int]) -> None:
        super().__init__()
        self._backend = backend
        self._skipped_ids = skipped_ids

    def __missing__(self, token_id: int) -> bytes:
        if token_id in self._skipped_ids:
            self[token_id] = b""
            return b""
        token = _token(self._backend, token_id)
        if token is None:  # not remembered, or strangers' numbers would fill the table
            return b""
        self[token_id] = piece = _to_bytes(token)
        return piece


class TextPieces(dict[int, "str | int | None"]):
    """Token id to text, to a raw byte (int), or to None for skipped and unknown ids."""

    def __init__(self, backend: Backend, rule: DecodingRule, skipped_ids: AbstractSet[int]) -> None:
        super().__init__()
        self._backend = backend
        self._rule = rule
        self._skipped_ids = skipped_ids

    def __missing__(self, token_id: int) -> str | int | None:
        token = None if token_id in self._skipped_ids else _token(self._backend, token_id)
        if token is None:  # not remembered, or strangers' numbers would fill the table
            return None
        self[token_id] = piece = self._to_piece(token)
        return piece

    def _to_piece(self, token: str) -> str | int:
        if self._rule.has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return replaced(token, self._rule.token_replacements)

    def first_piece(self, token_id: int, piece: str) -> str:
        """The text of a token that is the very first, given what it is elsewhere."""
        if not self._rule.dropped_char:
            return piece
        token = self._backend.id_to_token(token_id) or ""
        return replaced(token.replace(self._rule.dropped_char, ""), self._rule.token_replacements)


def replaced(text: str, replacements: tuple[tuple[str, str], ...]) -> str:
    """Applies literal replacements in their order."""
    for pattern, content in replacements:
        text = text.replace(pattern, content)
    return text


def _token(backend: Backend, token_id: int) -> str | None:
    try:
        return backend.id_to_token(token_id)
    except OverflowError as error:
        raise RequestError("a token id is out of range; ids are numbers of the vocabulary") from error


def _to_bytes(token: str) -> bytes:
    # As the library's ByteLevel decoder: a token with any character outside the alphabet (an added
    # token, say) stands for its own UTF-8.
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode("utf-8")
