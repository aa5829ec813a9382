# SPDX-License-Identifier: Apache-2.0
"""Qwen3 (Yang et al. 2025): Llama that normalizes every head's query and key before rotating them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.llama import Llama, LlamaAttention, LlamaLayer
from wavetrain_engine.models.model_config import ModelConfig


class Qwen3Attention(LlamaAttention):
    """Llama's attention with a norm over each head of query and key; the scale of each is shared by all heads."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, dtype: torch.dtype) -> None:
        super().__init__(config, layer, rotary, dtype)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)

    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        return self.q_norm, self.k_norm


class Qwen3Layer(LlamaLayer):
    """Llama's layer around Qwen3's attention."""

    attention_class: ClassVar[type[LlamaAttention]] = Qwen3Attention


class Qwen3(Llama):
    """The whole decoder."""

    layer_class: ClassVar[type[nn.Module]] = Qwen3Layer
