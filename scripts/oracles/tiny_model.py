# SPDX-License-Identifier: Apache-2.0
"""A random Llama of a few hundred thousand weights, and what is asked of every checkpoint that is made of it.

Runs in the environments of others' tools: nothing of ours is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANSWER = "oracle.json"


def write_tiny_model(directory: Path) -> None:
    """Writes the unquantized checkpoint, if it is not there yet."""
    if (directory / "config.json").exists():
        return
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    # The tools want a tokenizer, if only to ignore it.
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(512)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
    tokenizer.save_pretrained(directory)


def token_ids(count: int, length: int, seed: int) -> torch.Tensor:
    """Returns [count, length] random ids."""
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def write_answer(model: Any, directory: Path, *, tool: str) -> None:
    """Writes what `model` says: of each prompt, the log-probability of every token after the first."""
    prompts = token_ids(3, 48, seed=11)
    logits = model(prompts.to(model.device)).logits.float().cpu()
    scores = torch.log_softmax(logits, -1)[:, :-1].gather(2, prompts[:, 1:, None])[..., 0]
    answer = {"tool": tool, "prompts": prompts.tolist(), "logprobs": scores.tolist()}
    (directory / ANSWER).write_text(json.dumps(answer), encoding="utf-8")
