# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 (Gemma Team 2024).

    x = sqrt(H) * embedding;  x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)))

Norms scale by 1 + weight; scores and logits are soft-capped; every second layer sees a sliding window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.activation import GatedMLP
from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.llama import LlamaAttention
from wavetrain_engine.models.model import Model, select_wanted
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens


def _norm(config: ModelConfig, dtype: torch.dtype) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, weight_offset=1.0)


class Gemma2Layer(nn.Module):
    """One decoder layer, with a norm before and after each of its two blocks."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, dtype)
        self.self_attn = LlamaAttention(config, layer, rotary, dtype)
        self.post_attention_layernorm = _norm(config, dtype)
        self.pre_feedforward_layernorm = _norm(config, dtype)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
        )
        self.post_feedforward_layernorm = _norm(config, dtype)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        wanted: WantedTokens | None,
    ) -> tuple[Tensor, Tensor]:
        """Takes the last layer's output and its residual (None: the embeddings); returns this one's, not yet added.

        Keys and values are those of all tokens, what is returned that of the wanted ones.
        """
        rows, residual = self.input_layernorm.add(x, residual, self.self_attn.input_weight)
        x = self.post_attention_layernorm(self.self_attn(rows, positions, kv_cache, metadata, wanted))
        residual = select_wanted(residual, wanted)
        rows, residual = self.pre_feedforward_layernorm.add(x, residual, self.mlp.input_weight)
        return self.post_feedforward_layernorm(self.mlp(rows)), residual


class Gemma2(Model):
    """The whole decoder."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_model_len: int) -> None:
        super().__init__(config, dtype, device, max_model_len)
        rotary = RotaryEmbedding(config.head_dim, config.rope, max_model_len, dtype=dtype)
        self.layers = nn.ModuleList(Gemma2Layer(config, i, rotary, dtype) for i in range(config.num_layers))
        self.norm = _norm(config, dtype)

    def embedding_scale(self) -> float:
        # Rounded to the model's dtype as in training: in bfloat16, sqrt(3072) is 55.5.
        return torch.tensor(self.config.hidden_size**0.5).to(self.dtype).item()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[KVCache],
        metadata: AttentionMetadata,
        wanted: WantedTokens | None = None,
    ) -> Tensor:
        x, residual = self.embed_tokens(input_ids), None
        for index, (layer, kv_cache) in enumerate(zip(self.layers, kv_caches, strict=True), start=1):
            # Of the last layer only keys and values are needed beyond the tokens that somebody wants.
            chosen = wanted if index == len(self.layers) else None
            x, residual = layer(x, residual, positions, kv_cache, metadata, chosen)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits, cap = super().compute_logits(hidden), self.config.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
