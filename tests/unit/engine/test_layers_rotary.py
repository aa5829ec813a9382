# SPDX-License-Identifier: Apache-2.0
"""The rotary tables against transformers' own, bit for bit, for every type of scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.model_config import ModelConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn with its own factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    "yarn with mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn with betas": {"rope_type": "yarn", **YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
}


def our_table(values: dict[str, Any], length: int, dtype: torch.dtype) -> torch.Tensor:
    config = ModelConfig.from_mapping({**SHAPE, "architectures": ["LlamaForCausalLM"], "rope_parameters": values})
    rotary = RotaryEmbedding(config.head_dim, config.rope, length, dtype=dtype)
    rotary.allocate(torch.device("cpu"))
    return rotary.cos_sin_cache


def their_table(values: dict[str, Any], length: int, dtype: torch.dtype) -> torch.Tensor:
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 10000.0, **values})
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.stack([cos[0, :, :half], sin[0, :, :half]], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROPES)
def test_table_equals_transformers(name: str, dtype: torch.dtype) -> None:
    ours, theirs = our_table(ROPES[name], 1024, dtype), their_table(ROPES[name], 1024, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_dynamic_scaling_stretches_only_beyond_the_trained_length() -> None:
    dynamic, plain = ROPES["dynamic"], {"rope_type": "default"}
    assert torch.equal(our_table(dynamic, 1024, torch.float32), our_table(plain, 1024, torch.float32))
    stretched = our_table(dynamic, 1500, torch.float32)
    torch.testing.assert_close(stretched, their_table(dynamic, 1500, torch.float32), atol=0, rtol=0)
    assert not torch.equal(stretched[:1024], our_table(plain, 1024, torch.float32))


def test_a_table_longer_than_one_batch_of_rows_has_no_seam() -> None:
    length = 2**15 + 10
    ours, theirs = (table({"rope_type": "default"}, length, torch.float32) for table in (our_table, their_table))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
