# SPDX-License-Identifier: Apache-2.0
"""Tokenizers inside GGUF files: the same ids and texts as the tokenizer.json that they were made from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fakes import tiny_tokenizers as tiny
from fakes.gguf_files import write_gguf
from fakes.tiny_checkpoints import make_tiny_checkpoint
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.pre_tokenizers import PRE_TOKENIZERS
from wavetrain_engine.gguf.vocabulary import check_tokenizer
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer

TEXTS = [
    *tiny.SAMPLE_TEXTS, "", " ", "  a", "</s> tail <tool> hé llo x", "<s><s>", "\u0000\ufffd\u200d", "▁a ▁ b",
    "It'S 1234567 DON'T x\r\n\r\n  y\t z!!\n", "camelCase HTTPServer ÀÉîø ＡＢ",
]  # fmt: skip
LLAMA3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to put tokenizers into."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), with_tokenizer=False)


@pytest.fixture
def convert(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the GGUF file of a directory with a tokenizer."""

    def write(directory: Path, **options: Any) -> Path:
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_bytes((model / name).read_bytes())
        return write_gguf(directory, tmp_path / "x.gguf", **options)

    return write


def assert_same(path: Path, directory: Path, texts: list[str] = TEXTS) -> None:
    ours, original = Tokenizer.load(path), Tokenizer.load(directory)
    assert ours.vocab_size == original.vocab_size
    assert (ours.bos_token_id, ours.eos_token_id) == (original.bos_token_id, original.eos_token_id)
    assert ours.special_ids == original.special_ids
    for text in texts:
        for adds_special in (True, False):
            ids = ours.encode(text, adds_special)
            assert ids == original.encode(text, adds_special), text
            for skips_special in (True, False):
                assert ours.decode(ids, skips_special) == original.decode(ids, skips_special)
    for index in range(ours.vocab_size):
        assert ours.token_text(index) == original.token_text(index)


def train(directory: Path, pre_tokenizer: Any, *, normalizer: Any = None, ignores_merges: bool = False) -> Path:
    """A byte-level tokenizer that cuts words in its own way."""
    backend: Any = Backend(models.BPE(ignore_merges=ignores_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=480, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*tiny.SAMPLE_TEXTS, *TEXTS] * 3, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tiny.write_tokenizer(directory, backend, bos_token="<s>", eos_token="</s>", add_bos_token=True)


def split_by(*patterns: str) -> Any:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_byte_level(convert: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny.byte_level(tmp_path / "tokenizer", add_bos_token=True)
    assert_same(convert(directory), directory)


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        ("llama-bpe", split_by(LLAMA3)),
        ("smaug-bpe", split_by(LLAMA3)),
        ("qwen2", split_by(PRETOKENIZE_REGEX)),
        ("deepseek-r1-qwen", split_by(PRETOKENIZE_REGEX)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
    ],
)
def test_words_are_cut_as_in_the_models_own_tokenizer(
    convert: Callable[..., Path], tmp_path: Path, pre: str, pre_tokenizer: Any
) -> None:
    directory = train(tmp_path / "tokenizer", pre_tokenizer, ignores_merges=pre == "llama-bpe")
    assert_same(convert(directory, pre=pre), directory)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("tekken", ["camel", "Case", " HTTPServer", " ", "1", "2", "3", "4", " don", "'t", "!\n"]),
        ("gpt-4o", ["camel", "Case", " HTTPServer", " ", "123", "4", " don't", "!\n"]),
        ("deepseek-v3", ["camelCase", " HTTPServer", " ", "123", "4", " don", "'t", "!\n"]),
        ("deepseek-coder", ["camelCase", " HTTPServer", " ", "1", "2", "3", "4", " don", "'", "t", "!", "\n"]),
        ("seed-coder", ["camelCase", " HTTPServer", " ", "1", "2", "3", "4", " don", "'t", "!", "\n"]),
    ],
)
def test_other_cuts(convert: Callable[..., Path], tmp_path: Path, pre: str, words: list[str]) -> None:
    directory = tiny.byte_level(tmp_path / "tokenizer")
    loaded: Any = Tokenizer.load(convert(directory, pre=pre))
    text = "camelCase HTTPServer 1234 don't!\n"
    assert [text[start:stop] for _, (start, stop) in loaded._backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_every_rule_can_be_built(convert: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny.byte_level(tmp_path / "tokenizer")
    for pre in PRE_TOKENIZERS:
        loaded = Tokenizer.load(convert(directory, pre=pre))
        for text in tiny.SAMPLE_TEXTS:
            assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece(convert: Callable[..., Path], tmp_path: Path, has_prefix: bool) -> None:
    directory = tiny.sentencepiece(tmp_path / "tokenizer", "strip" if has_prefix else "gemma")
    if not has_prefix:
        path = directory / "tokenizer.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["normalizer"] = values["normalizer"]["normalizers"][1]
        path.write_text(json.dumps(values), encoding="utf-8")
    path = convert(directory, tokenizer__ggml__add_space_prefix=has_prefix)
    assert_same(path, directory)


def test_llama_cpps_assumptions(convert: Callable[..., Path], tmp_path: Path) -> None:
    """What a file does not say: SentencePiece's and Llama 3's add BOS; ids of special tokens."""
    directory = tiny.sentencepiece(tmp_path / "tokenizer")
    silent = {f"tokenizer__ggml__{name}": None for name in ("add_bos_token", "bos_token_id", "eos_token_id")}
    path = convert(directory, **silent)
    loaded = Tokenizer.load(path)
    assert (loaded.bos_token, loaded.eos_token, loaded.encode("a")[0]) == ("<s>", "</s>", 1)
    assert GenerationConfig.load(path).eos_token_ids == [2]
    directory = tiny.byte_level(tmp_path / "bytes")
    silent = {"tokenizer__ggml__add_bos_token": None}
    assert Tokenizer.load(convert(directory, pre="llama-bpe", **silent)).encode("a")[0] == 0
    assert Tokenizer.load(convert(directory, pre="gpt-2", **silent)).encode("a")[0] != 0


def test_ends_templates_and_sampling(convert: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny.byte_level(tmp_path / "tokenizer")
    path = convert(
        directory,
        tokenizer__ggml__eot_token_id=2,
        tokenizer__chat_template__tool_use="tools",
        general__sampling__temp=0.25,
        general__sampling__top_k=7,
    )
    generation = GenerationConfig.load(path)
    assert (generation.eos_token_ids, generation.temperature, generation.top_k) == ([1, 2], 0.25, 7)
    tokenizer = Tokenizer.load(path)
    template = ChatTemplate.load(path, tokenizer.named_tokens)
    assert template is not None
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages) == "<s><|user|>\nx</s>\n<|assistant|>\n"
    assert template.render(messages, tools=[{"name": "f"}]) == "tools"
    template.close()
    assert ChatTemplate.load(convert(directory, tokenizer__chat_template=None), {}) is None


def test_a_chat_models_ends_are_known_by_their_texts(convert: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny.byte_level(tmp_path / "tokenizer")
    path = directory / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|user|>", "<|im_end|>"), encoding="utf-8")
    assert GenerationConfig.load(convert(directory)).eos_token_ids == [1, 2]


ARRAYS = {
    "tokens": ["<unk>", "<s>", "a", "b", "ab"], "token_type": [2, 3, 1, 1, 1], "merges": ["a b"], "scores": [0.0] * 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model: tokenizer t5 is not supported, only gpt2 and llama are"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre: pre-tokenizer klingon is not supported; supported are"),
        ({"pre": None}, "tokenizer.ggml.pre: it is missing"),
        ({"tokens": None}, "has no tokenizer"),
        ({"tokens": ["a", "a", "b", "c", "d"]}, "tokenizer.ggml.tokens: the token a occurs twice"),
        ({"tokens": ["a", "b", "c", "d", "x" * 5000]}, "a token has more than"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: 1 types for 5 tokens"),
        ({"token_type": "a"}, "tokenizer.ggml.token_type must be an array of integers, got a"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: merge 0, ab, is no pair of tokens"),
        ({"merges": ["a z"]}, "tokenizer.ggml.tokens: the tokenizer cannot be built"),
        ({"merges": None}, "lacks the metadata tokenizer.ggml.merges"),
        ({"eos_token_id": 5}, "tokenizer.ggml.eos_token_id: 5 is no id of 5 tokens"),
        ({"add_bos_token": True, "bos_token_id": None}, "there is no tokenizer.ggml.bos_token_id"),
        ({"model": "llama", "scores": None}, "lacks the metadata tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores: 1 scores for 5 tokens"),
        ({"model": "llama", "scores": [float("nan")] * 5}, "a score is no finite number"),
    ],
)
def test_broken_tokenizers_are_refused(model: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    wanted = {"model": "gpt2", "pre": "gpt-2", **ARRAYS, **values}
    path = write_gguf(model, tmp_path / "x.gguf", **{f"tokenizer__ggml__{name}": wanted[name] for name in wanted})
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        Tokenizer.load(path)


def test_the_kind_is_checked_without_building(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    good = {"model": "gpt2", "pre": "gpt-2", **ARRAYS}
    for values, message in [({}, None), ({"pre": "klingon"}, "klingon"), ({"model": "bert"}, "bert")]:
        write_gguf(model, path, **{f"tokenizer__ggml__{name}": value for name, value in (good | values).items()})
        if message is None:
            check_tokenizer(GgufFile.open(path).metadata)
            continue
        with pytest.raises(CheckpointError, match=message):
            check_tokenizer(GgufFile.open(path).metadata)


def test_filling_is_no_token(convert: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny.byte_level(tmp_path / "tokenizer")  # of fewer tokens than the model's embedding has rows
    metadata = GgufFile.open(convert(directory)).metadata
    assert len(metadata.strings("tokenizer.ggml.tokens")) == 512
    assert metadata.integers("tokenizer.ggml.token_type")[-1] == TokenType.UNUSED
    assert Tokenizer.load(tmp_path / "x.gguf").vocab_size == Tokenizer.load(directory).vocab_size < 512
