# SPDX-License-Identifier: Apache-2.0
"""`bad_words`: strings that must not be generated, as token sequences the sampler can forbid."""

from __future__ import annotations

from collections.abc import Sequence

from wavetrain_engine.text.tokenizer import Tokenizer


def bad_words_token_ids(tokenizer: Tokenizer, bad_words: Sequence[str]) -> list[list[int]]:
    """Returns the token sequences of each word, at the beginning of a text and after a space.

    vLLM's rule: the second is added only where it is as long as the first and begins with another
    token, since many tokenizers write the space as part of the word's token.
    """
    sequences: list[list[int]] = []
    for word in bad_words:
        bare = word.lstrip()
        plain = tokenizer.encode(bare, add_special_tokens=False)
        spaced = tokenizer.encode(f" {bare}", add_special_tokens=False)
        if plain:
            sequences.append(plain)
        if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
            sequences.append(spaced)
    return sequences
