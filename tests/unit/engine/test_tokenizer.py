# SPDX-License-Identifier: Apache-2.0
"""Tokenizer against transformers' PreTrainedTokenizerFast on the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fakes import tiny_tokenizers as tiny
from wavetrain_engine.errors import CheckpointError, PromptTooLong, RequestError
from wavetrain_engine.text.tokenizer import Tokenizer

TEXTS = [*tiny.SAMPLE_TEXTS, "", " ", "  a", "</s> tail <tool> hé llo x", "<s><s>", "\u0000\ufffd\u200d", "▁a ▁ b"]

BUILDERS = {
    "byte_level": tiny.byte_level,
    "byte_level_cleaned": lambda path: tiny.byte_level(path, clean_up_tokenization_spaces=True),
    **{kind: lambda path, kind=kind: tiny.sentencepiece(path, kind) for kind in tiny.SENTENCEPIECE_KINDS},
    "word_level": tiny.word_level,
    "word_level_cleaned": lambda path: tiny.word_level(path, clean_up_tokenization_spaces=True),
}


@pytest.fixture(params=BUILDERS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return BUILDERS[request.param](tmp_path)


def test_encodes_and_decodes_as_transformers(directory: Path) -> None:
    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.special_ids >= set(theirs.all_special_ids)
    for text in TEXTS:
        for adds_special in (True, False):
            ids = ours.encode(text, adds_special)
            assert ids == theirs.encode(text, add_special_tokens=adds_special)
            for skips_special in (True, False):
                assert ours.decode(ids, skips_special) == theirs.decode(ids, skip_special_tokens=skips_special)


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "bos_token": None},
        {"pad_token": "<pad>", "additional_special_tokens": ["<|user|>", "<extra>"]},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False}},
        {"added_tokens_decoder": {"322": {"content": "<late>", "special": True, "normalized": False}}},
        {"added_tokens_decoder": {"0": {"content": "<s>", "special": True, "normalized": False}}},
        {"split_special_tokens": True},
        {"eos_token": "<tool>"},
    ],
)
def test_token_settings_as_transformers(tmp_path: Path, config: dict) -> None:
    tiny.byte_level(tmp_path, **config)
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a <pad> <extra> <late></s> <tool> b"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.vocab_size == len(theirs)
    for skips_special in (True, False):
        ids = list(range(ours.vocab_size))
        assert ours.decode(ids, skips_special) == theirs.decode(ids, skip_special_tokens=skips_special)


@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_bos_and_eos_where_only_the_config_says_so(tmp_path: Path, adds_bos: bool, adds_eos: bool) -> None:
    tiny.byte_level(tmp_path, add_bos_token=adds_bos, add_eos_token=adds_eos)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    bare = tokenizer.encode("x y", add_special_tokens=False)
    assert tokenizer.encode("x y") == [0] * adds_bos + bare + [1] * adds_eos


def test_special_tokens_map_of_older_writers(tmp_path: Path) -> None:
    tiny.byte_level(tmp_path, bos_token=None, eos_token=None)
    values = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(values), encoding="utf-8")
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.eos_token_id == theirs.eos_token_id == 1
    assert ours.encode("x<pad>") == theirs.encode("x<pad>")


def test_works_without_tokenizer_config(tmp_path: Path) -> None:
    tiny.byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("naïve 😀")) == "naïve 😀"
    assert tokenizer.eos_token_id is None


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tiny.byte_level(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    assert len(Tokenizer.load(tmp_path).encode("a long text with many tokens")) > 4


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*--skip-tokenizer-init") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object"),
        ("tokenizer_config.json", "\x00", "not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token must be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder must be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "is no token id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9999": "<new>"}}', "do not belong together"),
        ("tokenizer_config.json", '{"additional_special_tokens": "x"}', "must be a list"),
    ],
)
def test_broken_files_are_checkpoint_errors(tmp_path: Path, file: str, content: str, message: str) -> None:
    tiny.byte_level(tmp_path)
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


def test_bad_input_is_a_request_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.byte_level(tmp_path))
    with pytest.raises(RequestError, match="not a valid Unicode string"):
        tokenizer.encode("a\ud800b")
    for token_id in (-1, 2**32, 2**70):
        with pytest.raises(RequestError, match="out of range"):
            tokenizer.decode([token_id])
    assert tokenizer.decode([99999]) == ""


def test_far_too_long_text_is_refused_before_it_is_encoded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.byte_level(tmp_path))
    with pytest.raises(PromptTooLong, match="10000000 characters"):
        tokenizer.encode("x" * 10_000_000, max_tokens=100)
    assert tokenizer.encode("x", max_tokens=100) == tokenizer.encode("x")


def test_token_text_is_one_token_alone(tmp_path: Path) -> None:
    byte_level = Tokenizer.load(tiny.byte_level(tmp_path / "a"))
    assert byte_level.token_text(0) == "<s>"
    assert byte_level.token_text(byte_level.encode("é", False)[0]) in ("é", "\ufffd")
    llama = Tokenizer.load(tiny.sentencepiece(tmp_path / "b"))
    assert "".join(llama.token_text(token_id) for token_id in llama.encode("the self", False)) == " the self"
    assert llama.token_text(3 + 0x0A) == "\n"
    assert llama.token_text(3 + 0xE2) == "\ufffd"
    words = Tokenizer.load(tiny.word_level(tmp_path / "c"))
    assert words.token_text(2) == "a"
