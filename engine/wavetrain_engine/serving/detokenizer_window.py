# SPDX-License-Identifier: Apache-2.0
"""What the stateless detokenizer of the ensemble needs for each chunk, so that its text is exactly `llm`'s.

The engine's process follows the text anyway, for stop strings. Per response it sends a window: some ids, the tail
of ids before them, and which characters of `delta_text(tail, ids)` are the chunk's text. Held-back text (what may
still become a stop string) and text cut at a stop string are just characters outside of the span. A response about
several sequences has a window for each, one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wavetrain_engine.text.detokenizer import delta_text, next_tail
from wavetrain_engine.text.tokenizer import Tokenizer

_PROMPT_TAIL_TOKENS = 8
_SPAN_NUMBERS = 5  # of a window: tail ids, ids, first character, last character, is final


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One chunk's text is `window_text(tokenizer, window)`.

    Attributes:
        start, end: the chunk's characters in the window's text.
        is_final: the sequence has ended, so an unfinished character is text too.
    """

    tail_ids: list[int]
    token_ids: list[int]
    start: int
    end: int
    is_final: bool


def window_text(tokenizer: Tokenizer, window: Window) -> str:
    """The text of a chunk; the detokenizer's whole work."""
    text = delta_text(tokenizer, window.tail_ids, window.token_ids, is_final=window.is_final)
    return text[window.start : window.end]


def pack_windows(windows: Sequence[Window]) -> tuple[list[int], list[int], list[int]]:
    """A row's windows as the three tensors' content: all tails, all ids, and five numbers for each window."""
    tail_ids: list[int] = []
    token_ids: list[int] = []
    spans: list[int] = []
    for window in windows:
        tail_ids += window.tail_ids
        token_ids += window.token_ids
        spans += (len(window.tail_ids), len(window.token_ids), window.start, window.end, int(window.is_final))
    return tail_ids, token_ids, spans


def unpack_windows(tail_ids: Sequence[int], token_ids: Sequence[int], spans: Sequence[int]) -> list[Window]:
    """The inverse of `pack_windows`; what pads the ids behind the last window is left alone."""
    windows: list[Window] = []
    tail_at = ids_at = 0
    for index in range(0, len(spans) - _SPAN_NUMBERS + 1, _SPAN_NUMBERS):
        num_tail_ids, num_token_ids, start, end, is_final = spans[index : index + _SPAN_NUMBERS]
        windows.append(
            Window(
                tail_ids=list(tail_ids[tail_at : tail_at + num_tail_ids]),
                token_ids=list(token_ids[ids_at : ids_at + num_token_ids]),
                start=start,
                end=end,
                is_final=bool(is_final),
            )
        )
        tail_at += num_tail_ids
        ids_at += num_token_ids
    return windows


class WindowTracker:
    """Follows one sequence and makes its windows. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tail_ids = _tail_of_prompt(tokenizer, prompt_token_ids)
        self._token_ids: list[int] = []
        self._num_sent_chars = 0

    def advance(self, token_ids: Sequence[int], text: str, *, is_final: bool) -> Window:
        """The window of a chunk.

        Args:
            token_ids: the ids since the last chunk, without a last one that has no text (EOS, stop token).
            text: what the chunk is to say.
        """
        self._token_ids += token_ids
        start = self._num_sent_chars
        window = Window(
            tail_ids=self._tail_ids,
            token_ids=list(self._token_ids),
            start=start,
            end=start + len(text),
            is_final=is_final,
        )
        self._num_sent_chars += len(text)
        self._shorten()
        return window

    def _shorten(self) -> None:
        """Lets go of the ids whose text was sent completely: the next window begins after them."""
        certain = delta_text(self._tokenizer, self._tail_ids, self._token_ids)
        if len(certain) == self._num_sent_chars:
            self._tail_ids = next_tail(self._tokenizer, self._tail_ids, self._token_ids)
            self._token_ids = []
            self._num_sent_chars = 0


def _tail_of_prompt(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> list[int]:
    """The tail from which a fresh detokenizer goes on as TextStream's does after the prompt."""
    state = tokenizer.decoding_state(skip_special_tokens=True)
    state.push(tokenizer.visible_tail(prompt_token_ids, _PROMPT_TAIL_TOKENS, skip_special_tokens=True))
    tail = list(state.tail)
    state.settle()
    if state.tail == tail:
        return tail
    # Complete characters of a run of byte tokens were given up, and with them the sign that text came before,
    # without which SentencePiece's decoders would take the output's first space away.
    return [*_token_of_text(tokenizer), *state.tail]


def _token_of_text(tokenizer: Tokenizer) -> list[int]:
    """Any one token that is plain text, to stand for the text before."""
    for token_id in tokenizer.encode("a", add_special_tokens=False):
        state = tokenizer.decoding_state(skip_special_tokens=True)
        if state.push([token_id]) and not state.has_pending():
            return [token_id]
    return []
