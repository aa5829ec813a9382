# SPDX-License-Identifier: Apache-2.0
"""How byte-level tokenizers cut a text into words before they merge: by the name a GGUF file has for it.

The file holds the vocabulary and the merges, but of this step a name only (`tokenizer.ggml.pre`). Each rule below is
that of the models that the name stands for, as their tokenizer.json has it. A wrong one still gives tokens, and quietly
worse answers: so a name that is not here is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}[\r\n]*|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS[:-2]}\r\n]+|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_SPACES}"
)
_ASCII_SIGN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = (
    rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizerRule:
    """One way to cut.

    Attributes:
        splits: patterns, each applied to what the one before left; a match is a word of its own.
        has_digits: before anything else, every digit is a word of its own.
        has_gpt2_words: GPT-2's pattern comes last.
        ignores_merges: a word that is a token is that token, whatever the merges say.
        adds_bos: where the file does not say.
        is_composed: the text is put into normal form C first.
    """

    splits: tuple[str, ...] = ()
    has_digits: bool = False
    has_gpt2_words: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False
    is_composed: bool = False


_RULES: dict[PreTokenizerRule, tuple[str, ...]] = {
    PreTokenizerRule(splits=(_LLAMA3,), ignores_merges=True, adds_bos=True): (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral",
    ),
    PreTokenizerRule(splits=(_LLAMA3,)): ("smaug-bpe", "dbrx"),
    PreTokenizerRule(splits=(_QWEN2,), is_composed=True): ("qwen2",),
    PreTokenizerRule(splits=(_QWEN2,)): ("deepseek-r1-qwen", "megrez", "stablelm2"),
    PreTokenizerRule(splits=(_SEED_CODER,)): ("seed-coder",),
    PreTokenizerRule(splits=(_TEKKEN,), ignores_merges=True, adds_bos=True): ("tekken",),
    PreTokenizerRule(splits=(_GPT4O,)): ("gpt-4o",),
    PreTokenizerRule(splits=(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)): ("deepseek-v3",),
    PreTokenizerRule(
        splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ): ("deepseek-coder",),
    PreTokenizerRule(has_gpt2_words=True): ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"),
    PreTokenizerRule(has_digits=True, has_gpt2_words=True): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
    ),
}  # fmt: skip

PRE_TOKENIZERS: dict[str, PreTokenizerRule] = {name: rule for rule, names in _RULES.items() for name in names}
