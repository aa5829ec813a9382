# SPDX-License-Identifier: Apache-2.0
"""Measures the demo models and writes their model cards; the training is in train_demo_model.py.

Every figure is measured with the saved bf16 weights, on files that were not trained on, beside a baseline that anyone
can compute: a card that says "perplexity 9" says nothing without it.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

# Shapes: B = rows, T = tokens of a row, V = vocabulary.

PROMPTS = (
    "def __init__(self",
    "import os\n\ndef walk(top):",
    "<|user|>\nReturn the absolute path of a file.<|end|>\n<|assistant|>\n",
)
SMOOTHING = (0.001, 0.003, 0.01, 0.03, 0.1)  # the baseline gets the best of them, chosen on the held-out text itself
SAMPLE_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the training run knows and the card tells."""

    num_files: int
    num_bytes: int
    num_train_tokens: int
    held_out_files: list[str]
    held_out_bytes: int
    steps: int
    draft_steps: int
    tokens_per_step: int
    minutes: float
    draft_minutes: float
    threads: int
    seed: int
    learning_rates: tuple[float, float]
    contexts: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured on the held-out text."""

    perplexity: float
    draft_perplexity: float
    bigram_perplexity: float
    bigram_smoothing: float
    bits_per_byte: float
    draft_bits_per_byte: float
    num_tokens: int
    draft_agreement: float
    draft_acceptance: float


def logits_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Returns float32 logits [B, T, V] of tokens [B, T], computed in bf16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=tokens, use_cache=False).logits.float()


def _windows(stream: Tensor, context: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (inputs [1, T], targets [T]) that cover every transition of the stream once."""
    for start in range(0, len(stream) - 1, context):
        end = min(start + context, len(stream) - 1)
        yield stream[None, start:end], stream[start + 1 : end + 1]


@torch.no_grad()
def held_out_nll(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Returns the mean negative log-likelihood of the stream's tokens after the first, in nats."""
    total = sum(
        functional.cross_entropy(logits_of(model, inputs)[0], targets, reduction="sum").item()
        for inputs, targets in _windows(stream)
    )
    return total / (len(stream) - 1)


def bigram_nll(train: Tensor, held_out: Tensor, vocab_size: int) -> tuple[float, float]:
    """Returns the add-k smoothed bigram model's mean negative log-likelihood of the same tokens, and its k."""
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2)
    seen = pairs[held_out[:-1] * vocab_size + held_out[1:]].double()
    context = pairs.view(vocab_size, vocab_size).sum(1)[held_out[:-1]].double()
    return min((((context + k * vocab_size).log() - (seen + k).log()).mean().item(), k) for k in SMOOTHING)


@torch.no_grad()
def _agreement(model: LlamaForCausalLM, draft: LlamaForCausalLM, stream: Tensor) -> tuple[float, float]:
    """Returns how often the draft is right: shares of equal argmax and of accepted tokens in speculative sampling."""
    equal = accepted = 0.0
    for inputs, _ in _windows(stream):
        logits, draft_logits = logits_of(model, inputs)[0], logits_of(draft, inputs)[0]
        equal += (logits.argmax(-1) == draft_logits.argmax(-1)).sum().item()
        accepted += torch.minimum(logits.softmax(-1), draft_logits.softmax(-1)).sum().item()
    return equal / (len(stream) - 1), accepted / (len(stream) - 1)


def measure(folder: Path, draft_folder: Path, train: Tensor, held_out: Tensor, held_out_bytes: int) -> Figures:
    """Reads both checkpoints back and measures them."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    draft = LlamaForCausalLM.from_pretrained(draft_folder, dtype=torch.bfloat16)
    nll, draft_nll = held_out_nll(model, held_out), held_out_nll(draft, held_out)
    baseline, smoothing = bigram_nll(train, held_out, model.config.vocab_size)
    agreement, acceptance = _agreement(model, draft, held_out)
    bits_per_nat = (len(held_out) - 1) / held_out_bytes / math.log(2)
    return Figures(
        perplexity=math.exp(nll),
        draft_perplexity=math.exp(draft_nll),
        bigram_perplexity=math.exp(baseline),
        bigram_smoothing=smoothing,
        bits_per_byte=nll * bits_per_nat,
        draft_bits_per_byte=draft_nll * bits_per_nat,
        num_tokens=len(held_out) - 1,
        draft_agreement=agreement,
        draft_acceptance=acceptance,
    )


def _complete(model: Any, tokenizer: Tokenizer, prompt: str, seed: int | None) -> str:
    """Returns prompt and completion: greedy without a seed, else with generation_config.json's sampling.

    The model is Any because transformers' own types do not let a Llama generate.
    """
    inputs = torch.tensor([tokenizer.encode(prompt).ids])
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if seed is not None:
        torch.manual_seed(seed)
        how = {"do_sample": True}
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=SAMPLE_TOKENS, **how)
    return tokenizer.decode(output[0].tolist(), skip_special_tokens=False).removeprefix("<|bos|>")


def samples(folder: Path, seed: int) -> str:
    """Returns completions as Markdown: the first ones, not picked."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    blocks = [
        f"{how}:\n\n```python\n{_complete(model, tokenizer, prompt, choice).rstrip()}\n```\n"
        for prompt in PROMPTS
        for how, choice in (("Greedy", None), ("Sampled", seed))
    ]
    return "\n".join(blocks)


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.2f} MiB"


def _num_parameters(folder: Path) -> str:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


FRONT_MATTER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python, demo]
---
"""

LICENCE = """## Licence

The weights, the tokenizer and these files are under the Apache License 2.0, like the rest of the repository. They were
trained on the source of Python {version}'s standard library, which is under the Python Software Foundation License
Version 2 (Copyright © 2001 and later, Python Software Foundation; all rights reserved) and, for a few modules, under
licences that those modules name. The checkpoint holds none of that text, but a language model can repeat short passages
of what it was trained on. Nothing else was used.
"""


def draft_card(folder: Path, figures: Figures) -> str:
    """Returns the README.md of the draft's checkpoint."""
    return f"""{FRONT_MATTER}
# The demo model's draft

A one-layer Llama of {_num_parameters(folder)} parameters with the tokenizer of its sibling `demo`, for speculative
decoding: it proposes, `demo` decides. It was distilled: its loss was the cross-entropy to `demo`'s next-token
distribution, not to the text, because a draft that shares its sibling's mistakes is accepted more often.

| on the held-out files | |
|---|---|
| same most likely token as `demo` | {figures.draft_agreement:.1%} |
| tokens accepted by speculative sampling at temperature 1 | {figures.draft_acceptance:.1%} |
| perplexity per token | {figures.draft_perplexity:.2f} |
| bits per byte | {figures.draft_bits_per_byte:.3f} |

Recipe, held-out files and licence are those of `demo`; see its README.md.
"""


def _recipe(facts: Facts) -> str:
    seen = facts.steps * facts.tokens_per_step
    passes = seen / facts.num_train_tokens
    python, num_held_out = platform.python_version(), len(facts.held_out_files)
    short, long = facts.contexts
    rate, draft_rate = facts.learning_rates
    return f"""## Recipe

- Text: {facts.num_files} files of Python {python}'s standard library, without its tests, tables and generated files,
  {facts.num_bytes:,} bytes. A file is held out when the SHA-256 of its text says so, one in 40: here {num_held_out}
  files, {facts.held_out_bytes:,} bytes, named below. The tokenizer has not seen them either.
- Documents are `<|bos|>` … `<|eos|>`. Functions of up to 40 lines are seen a second time as a conversation, in which
  their docstring asks and their source answers, so that the chat template has a use.
- {facts.steps:,} steps of {facts.tokens_per_step:,} tokens, {seen / 1e6:.1f} million in all: {passes:.1f} times the
  {facts.num_train_tokens:,} training tokens. Context {short}; after 40 % of the run, {long} in one step of four.
- AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1, peak learning rate {rate}, 100 steps of
  warm-up, cosine to 2 %, bf16 autocast over float32 weights. The draft: {facts.draft_steps:,} steps at {draft_rate}.
- {facts.minutes:.0f} minutes, and {facts.draft_minutes:.0f} for the draft, on {facts.threads} CPU threads shared
  with other work. Seed {facts.seed}.

The same again with the same Python; the schedule of this run was stretched over minutes, not steps, so the weights come
out near these, not equal to them:

    python scripts/train_demo_model.py --steps {facts.steps} --draft-steps {facts.draft_steps} --seed {facts.seed}
"""


def card(folder: Path, facts: Facts, figures: Figures) -> str:
    """Returns the README.md of the main model's checkpoint."""
    bigram_bits = math.log2(figures.bigram_perplexity) * figures.num_tokens / facts.held_out_bytes
    vocab_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return f"""{FRONT_MATTER}
# The Wavetrain demo model

A Llama of {_num_parameters(folder)} parameters (bf16, tied embeddings, {_size(folder)} on disk) with its own byte-level
BPE tokenizer of {vocab_size:,} tokens, trained from scratch on the source of Python's standard library. It exists so
that a fresh clone can serve real text at once. It writes what looks like Python; it knows nothing, and its code is not
to be used. `demo-draft` beside it is its draft for speculative decoding.

| on {figures.num_tokens:,} held-out tokens | demo | bigram baseline |
|---|---|---|
| perplexity per token | {figures.perplexity:.2f} | {figures.bigram_perplexity:.2f} |
| bits per byte | {figures.bits_per_byte:.3f} | {bigram_bits:.3f} |

Measured with the saved bf16 weights over windows of 1,024 tokens. The baseline is an add-k smoothed bigram model of the
training files on the same tokens, with the k that suits the held-out text best ({figures.bigram_smoothing}).

{_recipe(facts)}
## Samples

The first ones, not picked: {SAMPLE_TOKENS} new tokens, greedy or with generation_config.json's temperature and top-p.

{samples(folder, facts.seed)}
{LICENCE.format(version=platform.python_version())}
## Held-out files

{", ".join(f"`{name}`" for name in facts.held_out_files)}
"""


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one rename, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
