# SPDX-License-Identifier: Apache-2.0
"""Model shapes as config.json files without weights: those are drawn on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHARED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_theta": 10000.0,
    },
}


def write_config(directory: Path, shape: str) -> Path:
    """Writes a shape's config.json into a folder and returns the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_SHARED, **SHAPES[shape]}, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


def weight_bytes_read(shape: str, weight_bytes: int) -> int:
    """Returns what a step reads of the weights: all but the embedding table, of which it reads a row a token."""
    values = SHAPES[shape]
    return weight_bytes - values["vocab_size"] * values["hidden_size"] * 2


def kv_bytes_per_token(shape: str) -> int:
    """Returns what a token of context takes in the cache, in bfloat16."""
    values = SHAPES[shape]
    return 2 * values["num_hidden_layers"] * values["num_key_value_heads"] * values["head_dim"] * 2
