#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a Llama-shaped checkpoint with random weights, for benchmarks: speed needs a shape, not knowledge.

    .venv/bin/python scripts/make_random_model.py --shape 129m --out /tmp/m-129m

A byte-level BPE tokenizer is trained beside it on Python's standard library.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 16384
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>"]
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8},
    "129m": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
NUM_KV_HEADS = {"tiny": 4, "129m": 4, "1b": 8}


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
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        max_position_embeddings=4096,
        num_key_value_heads=NUM_KV_HEADS[args.shape],
        tie_word_embeddings=args.shape != "129m",
        **SHAPES[args.shape],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(args.out)
    train_tokenizer().save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
