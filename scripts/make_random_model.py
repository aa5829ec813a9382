#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint with random weights, for benchmarks: speed needs a shape, not knowledge.

    .venv/bin/python scripts/make_random_model.py --shape 129m --out /tmp/m-129m

Shapes of three families: Llama's, and with mixtures of experts Mixtral's and Qwen3-MoE's. A byte-level BPE tokenizer is
trained beside it on Python's standard library.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 16384
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>"]


@dataclass(frozen=True)
class Shape:
    """What sets the sizes of a model.

    Attributes:
        classes: of transformers: the configuration's and the model's.
        options: values that the family has beside those of a Llama.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    is_tied: bool
    classes: tuple[Any, Any] = (LlamaConfig, LlamaForCausalLM)
    options: dict[str, Any] = field(default_factory=dict[str, Any])


SHAPES = {
    "tiny": Shape(256, 768, 4, 8, 4, is_tied=True),
    "129m": Shape(768, 3072, 12, 12, 4, is_tied=False),
    "1b": Shape(2048, 8192, 16, 32, 8, is_tied=True),
    # 0.5 billion parameters each; a token is multiplied with 145 and 88 million of them.
    "mixtral": Shape(
        768,
        2048,
        12,
        12,
        4,
        is_tied=False,
        classes=(MixtralConfig, MixtralForCausalLM),
        options={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": Shape(
        768,
        2048,
        12,
        12,
        4,
        is_tied=False,
        classes=(Qwen3MoeConfig, Qwen3MoeForCausalLM),
        options={
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "head_dim": 64,
        },
    ),
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the standard library, which every machine has."""
    library = Path(os.__file__).parent
    files = [
        str(path)
        for path in sorted(library.rglob("*.py"))
        if "site-packages" not in path.parts and "test" not in path.parts
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(files, trainer)
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def main() -> None:
    """Parses the arguments and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="129m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    shape = SHAPES[args.shape]
    config_class, model_class = shape.classes
    config = config_class(
        vocab_size=VOCAB_SIZE,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        max_position_embeddings=4096,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.is_tied,
        dtype=torch.bfloat16,
        **shape.options,
    )
    torch.set_default_dtype(torch.bfloat16)
    model_class(config).save_pretrained(args.out)
    train_tokenizer().save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
