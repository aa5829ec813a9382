# SPDX-License-Identifier: Apache-2.0
"""Detokenizer: what is held back and for how long, and where a continuation differs from a text of its own."""

from __future__ import annotations

import pytest

from fakes import tiny_tokenizers as tiny
from wavetrain_engine.errors import RequestError
from wavetrain_engine.text.clean_up import CleanUpFilter, clean_up
from wavetrain_engine.text.detokenizer import Detokenizer, delta_text, next_tail
from wavetrain_engine.text.tokenizer import Tokenizer

BYTE = 3  # id of <0x00> in the SentencePiece tokenizers


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.byte_level(tmp_path_factory.mktemp("byte_level"), vocab_size=259))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.sentencepiece(tmp_path_factory.mktemp("llama")))


def test_a_character_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a😀b", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.push([token_id]) for token_id in ids] == ["a", "", "", "", "😀", "b"]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_flushed_as_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a😀", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(ids) == "a"
    assert detokenizer.pending() == detokenizer.flush() == "\ufffd"


def test_special_tokens_are_skipped_or_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a</s>b", add_special_tokens=False)
    assert Detokenizer(byte_level).push(ids) == "ab"
    assert Detokenizer(byte_level, skip_special_tokens=False).push(ids) == "a</s>b"


def test_a_character_begun_by_the_prompt_belongs_to_the_output(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x😀", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level, prompt_token_ids=ids[:-2])
    assert detokenizer.push(ids[-2:]) == "😀"


def test_a_continuation_keeps_its_leading_space(llama: Tokenizer) -> None:
    ids = llama.encode("the", add_special_tokens=False)
    assert Detokenizer(llama).push(ids) == "the"
    assert Detokenizer(llama, prompt_token_ids=llama.encode("self")).push(ids) == " the"
    assert Detokenizer(llama, prompt_token_ids=[1]).push(ids) == "the"  # only BOS: still the beginning


def test_a_run_of_byte_tokens_is_held_until_it_ends(llama: Tokenizer) -> None:
    word = llama.encode("the", add_special_tokens=False)
    detokenizer = Detokenizer(llama)
    assert detokenizer.push([BYTE + 0xE6, BYTE + 0x97, BYTE + 0xA5]) == ""
    assert detokenizer.pending() == "日"
    assert detokenizer.push([BYTE + 0xFF]) == ""  # makes the whole run invalid, as in the library
    assert detokenizer.push(word) == "\ufffd\ufffd\ufffd\ufffd the"


def test_the_run_of_a_prompt_is_not_output_again(llama: Tokenizer) -> None:
    prompt = [*llama.encode("the"), BYTE + 0x0A, BYTE + 0xE6]
    detokenizer = Detokenizer(llama, prompt_token_ids=prompt)
    assert detokenizer.push([BYTE + 0x97, BYTE + 0xA5]) == ""
    assert detokenizer.flush() == "日"
    detokenizer = Detokenizer(llama, prompt_token_ids=[*prompt, BYTE + 0xFF])
    assert detokenizer.push([BYTE + 0x41]) + detokenizer.flush() == "A"


def test_tails_are_short(byte_level: Tokenizer, llama: Tokenizer) -> None:
    ids = byte_level.encode("héllo 日本" * 50, add_special_tokens=False)
    assert max(len(next_tail(byte_level, [], ids[:end])) for end in range(len(ids))) <= 3
    assert next_tail(llama, [], llama.encode("the self")) == llama.encode("the self")[-1:]


def test_a_stateless_step_flushes_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("日", add_special_tokens=False)
    assert delta_text(byte_level, ids[:1], ids[1:]) == "日"
    assert delta_text(byte_level, ids[:1], ids[1:2]) == ""
    assert delta_text(byte_level, ids[:1], ids[1:2], is_final=True) == "\ufffd"
    assert delta_text(byte_level, ids[:2], [], is_final=True) == "\ufffd"


def test_ids_that_cannot_be_tokens(byte_level: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (byte_level, llama):
        assert delta_text(tokenizer, [], [12345678]) == ""
        with pytest.raises(RequestError, match="out of range"):
            delta_text(tokenizer, [], [-1])


def test_clean_up_waits_only_where_it_must() -> None:
    text = "I do n't know , it 's a ' b ' here . ' ' , n 't !"
    assert "".join(map(CleanUpFilter().push, ["abc", " d"])) == "abc d"
    filtered = CleanUpFilter()
    assert "".join(filtered.push(char) for char in text) + filtered.flush() == clean_up(text)
