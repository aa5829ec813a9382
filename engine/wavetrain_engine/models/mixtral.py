# SPDX-License-Identifier: Apache-2.0
"""Mixtral (Jiang et al. 2024): Mistral whose feed-forward blocks are mixtures of experts.

x = x + attention(norm(x));  x = x + sum of weight * expert(norm(x)) over the experts of a token, weights adding up to 1
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.layers.moe import ExpertNames, MixtureOfExperts
from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.llama import Llama, LlamaAttention
from wavetrain_engine.models.model import select_wanted
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens

_NAMES = ExpertNames(gate="w1", up="w3", down="w2")


def mixture_of(config: ModelConfig, dtype: torch.dtype, names: ExpertNames | None = None) -> MixtureOfExperts:
    """Returns the mixture that a layer of `config` has."""
    moe = config.moe
    assert moe is not None, "the family has mixtures of experts"
    return MixtureOfExperts(
        config.hidden_size,
        moe.intermediate_size,
        num_experts=moe.num_experts,
        top_k=moe.num_experts_per_tok,
        is_renormalized=moe.is_renormalized,
        hidden_act=config.hidden_act,
        dtype=dtype,
        names=names,
    )


class MixtralLayer(nn.Module):
    """One decoder layer; its modules are named as in checkpoints."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, layer, rotary, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.block_sparse_moe = mixture_of(config, dtype, _NAMES)

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
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.block_sparse_moe(x), residual


class Mixtral(Llama):
    """The whole decoder."""

    layer_class: ClassVar[type[nn.Module]] = MixtralLayer
