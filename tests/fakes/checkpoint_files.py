# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory made of headers and a few zeros: enough for everything that never computes."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_checkpoint(directory: Path, **config: object) -> Path:
    """Writes a Llama-shaped checkpoint; `config` changes keys of its config.json (None removes one)."""
    directory.mkdir(parents=True)
    values: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
    }
    values = {name: value for name, value in (values | config).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    return directory
