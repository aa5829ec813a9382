# SPDX-License-Identifier: Apache-2.0
"""The state machines that turn tokens into text, one token at a time, for each DecodingKind.

Invariant: what `push` has returned, followed by `pending`, is what the tokenizer decodes from all
tokens so far; and no later token changes what `push` has returned. So an incomplete UTF-8 sequence is
held back, and so is a run of byte tokens until it ends: one invalid byte turns the whole run into
U+FFFD in SentencePiece's decoders.

`tail` holds the ids from which a fresh state reaches the same point: the ids of what is held back,
after one id that shows that text came before, where that matters.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from wavetrain_engine.text.decoding_rule import DecodingRule
from wavetrain_engine.text.pieces import BytePieces, TextPieces, replaced

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_WINDOW_TOKENS = 8
_WINDOW_TOKENS_AT_MOST = 64
_REPLACEMENT = "\ufffd"


class DecodingState(Protocol):
    """Follows the tokens of one text."""

    tail: list[int]

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is certain now."""
        ...

    def pending(self) -> str:
        """The text of the tokens that are held back, should no other follow. Changes nothing."""
        ...

    def has_pending(self) -> bool:
        """Whether anything is held back."""
        ...

    def settle(self) -> None:
        """Gives up what is held back but the start of an unfinished character: a new text begins here."""
        ...


class ByteLevelState:
    """UTF-8 across token borders."""

    __slots__ = ("_bytes", "_pieces", "tail")

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._bytes = b""
        self.tail: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is certain now."""
        pieces = self._pieces
        if not self._bytes:
            try:
                if len(token_ids) == 1:
                    return pieces[token_ids[0]].decode()
                return b"".join([pieces[token_id] for token_id in token_ids]).decode()
            except UnicodeDecodeError:
                pass
        return self._push_slowly(token_ids)

    def _push_slowly(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        decoder = _utf8_decoder("replace")
        text = decoder.decode(self._bytes + b"".join([pieces[token_id] for token_id in token_ids]))
        self._bytes = decoder.getstate()[0]
        visible = [*self.tail, *(token_id for token_id in token_ids if pieces[token_id])]
        num_tokens = num_bytes = 0
        while num_bytes < len(self._bytes):
            num_tokens += 1
            num_bytes += len(pieces[visible[-num_tokens]])
        self.tail = visible[len(visible) - num_tokens :]
        return text

    def pending(self) -> str:
        """The text of the tokens that are held back, should no other follow."""
        return self._bytes.decode("utf-8", "replace")

    def has_pending(self) -> bool:
        """Whether anything is held back."""
        return bool(self._bytes)

    def settle(self) -> None:
        """Nothing to give up: only the start of an unfinished character is ever held back."""


class PiecesState:
    """Texts and runs of byte tokens, as SentencePiece tokenizers have them."""

    __slots__ = ("_is_first_token", "_is_stripping", "_pieces", "_rule", "_run", "tail")

    def __init__(self, pieces: TextPieces, rule: DecodingRule) -> None:
        self._pieces = pieces
        self._rule = rule
        self._run = bytearray()
        self._is_first_token = True
        self._is_stripping = bool(rule.stripped_char)
        self.tail: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is certain now."""
        parts: list[str] = []
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if piece is None:
                continue
            if isinstance(piece, int):
                self._run.append(piece)
                self.tail.append(token_id)
            else:
                self._push_text(token_id, piece, parts)
            self._is_first_token = False
        return "".join(parts)

    def _push_text(self, token_id: int, piece: str, parts: list[str]) -> None:
        if self._is_first_token:
            piece = self._pieces.first_piece(token_id, piece)
        if self._run:
            parts.append(self._stripped(self._run_text()))
            self._run.clear()
        parts.append(self._stripped(piece))
        # A fresh state needs a token to know that text came before; as long as it is still the
        # beginning, there is nothing to know. A token without text shows nothing, so it is added.
        if self._is_stripping:
            self.tail = []
        elif piece:
            self.tail = [token_id]
        else:
            self.tail.append(token_id)

    def _stripped(self, text: str) -> str:
        if not self._is_stripping or not text:
            return text
        self._is_stripping = False
        return text[1:] if text[0] == self._rule.stripped_char else text

    def _run_text(self) -> str:
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            text = _REPLACEMENT * len(self._run)
        return replaced(text, self._rule.run_replacements)

    def pending(self) -> str:
        """The text of the tokens that are held back, should no other follow."""
        if not self._run:
            return ""
        text = self._run_text()
        is_stripped = self._is_stripping and text.startswith(self._rule.stripped_char)
        return text[1:] if is_stripped else text

    def has_pending(self) -> bool:
        """Whether anything is held back."""
        return bool(self._run)

    def settle(self) -> None:
        """Gives up the complete characters of an open run."""
        if not self._run:
            return
        decoder = _utf8_decoder("strict")
        try:
            text = decoder.decode(bytes(self._run))
            rest = decoder.getstate()[0]
        except UnicodeDecodeError:
            text, rest = self._run_text(), b""
        self._stripped(text)
        self._run = bytearray(rest)
        self.tail = self.tail[len(self.tail) - len(rest) :]


class WindowState:
    """Any other decoder: the difference between two decoded windows of the last tokens."""

    __slots__ = ("_decode", "_emitted", "_pending", "tail")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._emitted = ""
        self._pending = ""
        self.tail: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is certain now."""
        self.tail.extend(token_ids)
        text = self._decode(self.tail)
        is_open = text.endswith(_REPLACEMENT) and len(self.tail) < _WINDOW_TOKENS_AT_MOST
        certain = text.rstrip(_REPLACEMENT) if is_open else text
        if not certain.startswith(self._emitted):
            certain = self._emitted  # the decoder took text back; what has left stays, and the rest waits
        delta = certain[len(self._emitted) :]
        self._emitted = certain
        self._pending = text[len(certain) :]
        if not self._pending and len(self.tail) > 2 * _WINDOW_TOKENS:
            self.tail = self.tail[-_WINDOW_TOKENS:]
            self._emitted = self._decode(self.tail)
        return delta

    def pending(self) -> str:
        """The text of the tokens that are held back, should no other follow."""
        return self._pending

    def has_pending(self) -> bool:
        """Whether anything is held back."""
        return bool(self._pending)

    def settle(self) -> None:
        """Nothing to give up: only the start of an unfinished character is ever held back."""
