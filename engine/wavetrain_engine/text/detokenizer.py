# SPDX-License-Identifier: Apache-2.0
"""Token ids to text, piece by piece: a pure function for stateless steps, a class for streams.

With `clean` for "without what later tokens may still change", both compute

    delta = clean(decode(tail + new)) - clean(decode(tail))

so the deltas always concatenate to `decode(all)`, however the ids are cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from wavetrain_engine.text.clean_up import CleanUpFilter
from wavetrain_engine.text.tokenizer import Tokenizer

_PROMPT_TAIL_TOKENS = 8


class Detokenizer:
    """Follows the tokens of one text; each push costs as much as its new tokens. Not thread-safe.

    With a prompt, the text is the prompt's continuation: what `decode(prompt + output)` has after
    `decode(prompt)`. A character that the prompt's last tokens only begin belongs to the output, and
    the space that SentencePiece's decoders take from the beginning of a text stays. Without one, the
    text is `decode(output)`.
    """

    __slots__ = ("_clean_up", "_state")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._state = tokenizer.decoding_state(skip_special_tokens)
        self._clean_up = CleanUpFilter() if tokenizer.cleans_up else None
        if prompt_token_ids:
            self._state.push(tokenizer.visible_tail(prompt_token_ids, _PROMPT_TAIL_TOKENS, skip_special_tokens))
            self._state.settle()

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new ids; returns the text that no later token can change."""
        text = self._state.push(token_ids)
        return text if self._clean_up is None else self._clean_up.push(text)

    def pending(self) -> str:
        """What `flush` would return now. Changes nothing."""
        text = self._state.pending() if self._state.has_pending() else ""
        if self._clean_up is None:
            return text
        copy = CleanUpFilter()
        copy.held = self._clean_up.held
        return copy.push(text) + copy.flush()

    def flush(self) -> str:
        """Returns the text of what was held back. Call it once, after the last push."""
        text = self._state.pending() if self._state.has_pending() else ""
        return text if self._clean_up is None else self._clean_up.push(text) + self._clean_up.flush()


def delta_text(
    tokenizer: Tokenizer,
    tail_ids: Sequence[int],
    new_ids: Sequence[int],
    *,
    is_final: bool = False,
    skip_special_tokens: bool = True,
) -> str:
    """Returns what `new_ids` add to a text, given the tail of the ids before them.

    Args:
        tail_ids: what `next_tail` gave for the chunk before; empty at the text's beginning. Any longer
            suffix of the earlier ids gives the same, all of them included.
        is_final: no chunk follows: the text of an unfinished character is returned too.
    """
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    if tail_ids:
        detokenizer.push(tail_ids)
    text = detokenizer.push(new_ids)
    return text + detokenizer.flush() if is_final else text


def next_tail(
    tokenizer: Tokenizer, tail_ids: Sequence[int], new_ids: Sequence[int], *, skip_special_tokens: bool = True
) -> list[int]:
    """Returns the tail for the chunk after `new_ids`: from these ids alone, delta_text goes on exactly.

    It is short: the ids of a character that is not finished, or of a run of SentencePiece's byte
    tokens that is not finished, after one id that shows that the text has begun. A tokenizer with
    `clean_up_tokenization_spaces` has no such border to rely on: there, the tail is all ids.
    """
    if tokenizer.cleans_up:
        return [*tail_ids, *new_ids]
    state = tokenizer.decoding_state(skip_special_tokens)
    state.push([*tail_ids, *new_ids])
    return list(state.tail)
