# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3 and 3.1 (Touvron et al. 2023, Dubey et al. 2024): the decoder the other families vary.

x = x + attention(norm(x));  x = x + mlp(norm(x))          RMSNorm, grouped-query attention, rotary, SwiGLU
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.activation import GatedMLP
from wavetrain_engine.layers.attention import KVCache, PagedAttention
from wavetrain_engine.layers.linear import Linear, MergedLinear
from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.model import Model, select_wanted
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_kernels import ops
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens


class LlamaAttention(nn.Module):
    """Projects, rotates, attends, projects back."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedLinear(config.hidden_size, parts, bias=config.attention_bias, dtype=dtype)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_output_bias, dtype=dtype)
        self.rotary = rotary
        self.attention = PagedAttention(
            scale=config.query_pre_attn_scalar**-0.5,
            sliding_window=config.sliding_windows[layer],
            soft_cap=config.attention_soft_cap,
        )

    @property
    def input_weight(self) -> ops.PackedWeight | None:
        """The only weight that reads this block's input; None: there are several."""
        return self.qkv_proj.only_weight

    def forward(
        self,
        x: ops.Rows,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        wanted: WantedTokens | None,
    ) -> Tensor:
        """Takes x [T, H]; returns [T, H], or [N, H] of the wanted tokens."""
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj.split(x))
        query = self.rotary(query, key, value, positions, kv_cache, metadata.slot_mapping, self.head_norms())
        if wanted is not None:
            query, metadata = ops.select_rows(query, wanted.indices), wanted.metadata
        return self.o_proj(self.attention(query, kv_cache, metadata))

    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """Returns the norms of each head of query and key before the rotation; None: a family without them."""
        return None


class LlamaLayer(nn.Module):
    """One decoder layer. The residual stream travels beside the input, so that adding and norm are one op."""

    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = self.attention_class(config, layer, rotary, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = self.feed_forward(config, layer, dtype)

    def feed_forward(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> nn.Module:
        """Returns the block after attention; in Qwen3-MoE it depends on the layer."""
        del layer
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
        )

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
        x, residual = self.self_attn(rows, positions, kv_cache, metadata, wanted), select_wanted(residual, wanted)
        reader = self.mlp.input_weight if isinstance(self.mlp, GatedMLP) else None
        rows, residual = self.post_attention_layernorm.add(x, residual, reader)
        return self.mlp(rows), residual


class Llama(Model):
    """The whole decoder."""

    layer_class: ClassVar[type[nn.Module]] = LlamaLayer

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_model_len: int) -> None:
        super().__init__(config, dtype, device, max_model_len)
        rotary = RotaryEmbedding(config.head_dim, config.rope, max_model_len, dtype=dtype)
        self.layers = nn.ModuleList(self.layer_class(config, i, rotary, dtype) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

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
