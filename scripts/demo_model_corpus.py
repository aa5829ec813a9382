# SPDX-License-Identifier: Apache-2.0
"""The text and the tokenizer of the demo models: Python's standard library, split, encoded and packed.

The split goes by the content of a file, so every machine with the same Python makes the same corpus.
"""

from __future__ import annotations

import ast
import hashlib
import os
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
BOS, EOS, PAD, END = 0, 1, 2, 6
VOCAB_SIZE = 4096
LONG_CONTEXT = 2048  # every position that the models are trained for
# Tests would teach assert statements, tables teach nothing, and _sysconfigdata holds the build machine's paths.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
HELD_OUT_ONE_IN = 40
MAX_CHAT_LINES = 40

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "pad_token": "<|pad|>",
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "model_max_length": LONG_CONTEXT,
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text, split by file, and its token streams; documents are bos ... eos, one after another."""

    num_files: int
    num_bytes: int
    held_out_files: list[str]
    held_out_bytes: int
    files: Tensor  # [N] training files only: what the bigram baseline counts
    train: Tensor  # [M] training files and chat examples, in a shuffled order
    starts: Tensor  # positions of `train` where a line begins
    held_out: Tensor  # [K]


def read_files() -> dict[str, str]:
    """Returns the library's sources by relative path, in path order, without those that are not text."""
    root = Path(os.__file__).parent
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                files[relative.as_posix()] = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
    return files


def is_held_out(text: str) -> bool:
    """Decides by content, so that the split is the same on every machine with the same library."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def chat_examples(text: str) -> Iterator[str]:
    """Yields (docstring asks, function answers) conversations, in the form the chat template gives them."""
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return
    lines = text.split("\n")  # as the parser counts: splitlines would also split at form feeds
    for node in nodes:
        question = (ast.get_docstring(node) or "").partition("\n\n")[0].strip()
        source = lines[node.lineno - 1 : node.end_lineno]
        if question and len(source) <= MAX_CHAT_LINES:
            answer = textwrap.dedent("\n".join(source))
            yield f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer: every text has a lossless encoding, and bos comes first as in Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B:1", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Returns one document a text, closed by eos."""
    return [[*encoding.ids, EOS] for encoding in tokenizer.encode_batch(texts)]


def flatten(documents: list[list[int]]) -> Tensor:
    """Packs documents into one stream."""
    return torch.tensor([token for document in documents for token in document])


def build_corpus(tokenizer: Tokenizer, files: dict[str, str], seed: int) -> Corpus:
    """Splits, encodes and packs the text."""
    held_out = {name: text for name, text in files.items() if is_held_out(text)}
    texts = [text for name, text in files.items() if name not in held_out]
    chats = [example for text in texts for example in chat_examples(text)]
    documents = encode(tokenizer, texts)
    mixed = documents + encode(tokenizer, chats)
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed)).tolist()
    train = flatten([mixed[i] for i in order])
    pieces = tokenizer.decode_batch([[i] for i in range(VOCAB_SIZE)], skip_special_tokens=False)
    opens_line = torch.tensor([i == BOS or "\n" in piece for i, piece in enumerate(pieces)])
    starts = opens_line[train[:-LONG_CONTEXT]].nonzero().flatten() + 1
    return Corpus(
        num_files=len(files),
        num_bytes=sum(len(text.encode("utf-8")) for text in files.values()),
        held_out_files=sorted(held_out),
        held_out_bytes=sum(len(text.encode("utf-8")) for text in held_out.values()),
        files=flatten(documents),
        train=train,
        starts=starts,
        held_out=flatten(encode(tokenizer, list(held_out.values()))),
    )
