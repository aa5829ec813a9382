# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hugging Face checkpoints of every served family, written by transformers itself.

transformers writes the files and is the oracle of the tests that read them, so nothing here may use our
own config parser or loader. Norm weights and biases are made random too: with the ones and zeros of a
fresh model a forgotten bias or a wrong norm would pass every comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 512
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 0, 1, 2
MAX_POSITION_EMBEDDINGS = 512
SLIDING_WINDOW = 24


@dataclass(frozen=True)
class TinyFamily:
    """One checkpoint recipe: the transformers classes, and what differs from the shared tiny shape."""

    config_class: type
    model_class: type
    options: dict[str, Any] = field(default_factory=dict)


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


TINY_FAMILIES: dict[str, TinyFamily] = {
    "llama": TinyFamily(LlamaConfig, LlamaForCausalLM),
    "llama-bias": TinyFamily(LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": TinyFamily(
        LlamaConfig,
        LlamaForCausalLM,
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-rope-linear": TinyFamily(LlamaConfig, LlamaForCausalLM, _rope("linear", factor=4.0)),
    # The factor acts beyond max_position_embeddings only, so this one's is small.
    "llama-rope-dynamic": TinyFamily(
        LlamaConfig, LlamaForCausalLM, {"max_position_embeddings": 128, **_rope("dynamic", factor=4.0)}
    ),
    "llama-rope-yarn": TinyFamily(
        LlamaConfig, LlamaForCausalLM, _rope("yarn", factor=8.0, original_max_position_embeddings=64)
    ),
    "mistral": TinyFamily(MistralConfig, MistralForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "mixtral": TinyFamily(MixtralConfig, MixtralForCausalLM, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": TinyFamily(
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": SLIDING_WINDOW},
    ),
    "qwen2": TinyFamily(Qwen2Config, Qwen2ForCausalLM),
    "qwen2-window": TinyFamily(
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 1},
    ),
    "qwen3": TinyFamily(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": TinyFamily(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    # Mixtures in one layer of four: the first has none by the step, the last by name.
    "qwen3-moe-mixed": TinyFamily(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
        },
    ),
    "gemma2": TinyFamily(
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": SLIDING_WINDOW,
            "num_hidden_layers": 4,
            # Small enough to bend every score; and small embeddings, or the tied head only repeats its input.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
        },
    ),
}


def make_tiny_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    tied: bool | None = None,
    sharded: bool = False,
    with_tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Writes a checkpoint of `family` (a key of TINY_FAMILIES) into `directory` and returns it.

    Args:
        tied: whether lm_head shares the embedding's memory; None: as the family usually has it.
        sharded: several model-0000x-of-0000y.safetensors and an index, instead of one file.
        options: config values that replace the recipe's (num_hidden_layers=4, ...).
    """
    recipe = TINY_FAMILIES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        # Wider than the usual 0.02, so that the best and second best logit are far apart in float32.
        "initializer_range": 0.15,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "tie_word_embeddings": False,
        **recipe.options,
        **({} if tied is None else {"tie_word_embeddings": tied}),
        **options,
    }
    # A fork keeps the caller's generator as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.model_class(recipe.config_class(**values))
        _randomize_norms_and_biases(model)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory, max_shard_size="150KB" if sharded else "1GB")
    if with_tokenizer:
        _write_tokenizer(directory)
    return directory


class TinyCheckpoints:
    """Makes each checkpoint once; meant for a session fixture over `tmp_path_factory.mktemp(...)`.

    The directories are shared between tests: a test that damages one copies it first.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def get(self, family: str = "llama", **options: Any) -> Path:
        """Returns the directory of `make_tiny_checkpoint(..., family, **options)`."""
        key = json.dumps([family, options], sort_keys=True, default=str)
        if key not in self._made:
            self._made[key] = make_tiny_checkpoint(self._root / f"{family}-{len(self._made)}", family, **options)
        return self._made[key]


def _randomize_norms_and_biases(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _write_tokenizer(directory: Path) -> None:
    """Writes a byte-level BPE tokenizer of exactly VOCAB_SIZE tokens, and a small chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
