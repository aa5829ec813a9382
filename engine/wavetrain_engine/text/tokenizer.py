# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with Hugging Face's results and without transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from wavetrain_engine.errors import PromptTooLong, RequestError
from wavetrain_engine.text.clean_up import clean_up
from wavetrain_engine.text.decoding_rule import DecodingKind, DecodingRule
from wavetrain_engine.text.decoding_state import ByteLevelState, DecodingState, PiecesState, WindowState
from wavetrain_engine.text.pieces import BytePieces, TextPieces
from wavetrain_engine.text.tokenizer_files import TokenizerFiles


class Tokenizer:
    """A checkpoint's tokenizer. All methods may be called from any thread.

    Attributes:
        bos_token, eos_token: the texts of these tokens, or None.
        bos_token_id, eos_token_id: their ids, or None. What ends a generation is generation_config's
            list, not this one id.
        special_ids: tokens that `skip_special_tokens` leaves out.
        cleans_up: decoding ends with `clean_up_tokenization_spaces`.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend = files.backend
        self.named_tokens = dict(files.named_tokens)
        self.cleans_up = files.cleans_up
        self.bos_token = files.named_tokens.get("bos_token")
        self.eos_token = files.named_tokens.get("eos_token")
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._rule = DecodingRule.of(self._backend)
        # Two tables of each kind: without special tokens, and with them.
        skipped = (self.special_ids, frozenset[int]())
        self._byte_pieces = [BytePieces(self._backend, ids) for ids in skipped]
        self._text_pieces = [TextPieces(self._backend, self._rule, ids) for ids in skipped]

    @classmethod
    def load(cls, model_dir: Path | str) -> Tokenizer:
        """Reads tokenizer.json and the files beside it.

        Raises:
            CheckpointError: tokenizer.json is missing, or a file is broken.
        """
        return cls(TokenizerFiles.read(Path(model_dir)))

    @property
    def vocab_size(self) -> int:
        """All tokens, added ones included (transformers' `len(tokenizer)`)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def max_chars_per_token(self) -> int:
        """The length of the longest token: a text of c characters has at least c / this many tokens."""
        return max((len(token) for token in self._backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Returns the token ids of a text; special tokens spelt out in it become those tokens.

        Args:
            add_special_tokens: with BOS and EOS where the checkpoint says so.
            max_tokens: a text that surely has more is refused before any work is done on it.

        Raises:
            RequestError: the text is not valid Unicode (it has a lone surrogate).
            PromptTooLong: the text surely has more than `max_tokens` tokens.
        """
        if max_tokens is not None and len(text) > max_tokens * self.max_chars_per_token:
            raise PromptTooLong(f"the prompt has {len(text)} characters, far more than {max_tokens} tokens; shorten it")
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # which of them depends on the library's version
            raise RequestError("the text is not a valid Unicode string; send valid UTF-8") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; ids that are no token have none.

        Raises:
            RequestError: an id is negative or too large to be one.
        """
        text = self._decode_uncleaned(token_ids, skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def token_text(self, token_id: int) -> str:
        """Returns what one token alone looks like, special or not; part of a character is U+FFFD."""
        if self._rule.kind is DecodingKind.BYTE_LEVEL:
            return self._byte_pieces[1][token_id].decode("utf-8", "replace")
        if self._rule.kind is DecodingKind.WINDOW:
            return self._decode_uncleaned([token_id], False)
        piece = self._text_pieces[1][token_id]
        if isinstance(piece, int):
            return chr(piece) if piece < 0x80 else "\ufffd"
        return piece or ""

    def decoding_state(self, skip_special_tokens: bool) -> DecodingState:
        """Returns a fresh state machine that follows the tokens of one text, before any clean-up."""
        if self._rule.kind is DecodingKind.BYTE_LEVEL:
            return ByteLevelState(self._byte_pieces[0 if skip_special_tokens else 1])
        if self._rule.kind is DecodingKind.PIECES:
            return PiecesState(self._text_pieces[0 if skip_special_tokens else 1], self._rule)
        return WindowState(functools.partial(self._decode_uncleaned, skip_special_tokens=skip_special_tokens))

    def visible_tail(self, token_ids: Sequence[int], num_tokens: int, skip_special_tokens: bool) -> Sequence[int]:
        """Returns the shortest suffix that holds `num_tokens` tokens of text, or all ids."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        for start in range(len(token_ids) - 1, -1, -1):
            if token_ids[start] not in skipped:
                num_tokens -= 1
                if not num_tokens:
                    return token_ids[start:]
        return token_ids

    def _decode_uncleaned(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        try:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError("a token id is out of range; ids are numbers of the vocabulary") from error

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)
