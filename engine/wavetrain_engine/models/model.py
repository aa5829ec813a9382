# SPDX-License-Identifier: Apache-2.0
"""What the worker sees of every family: forward, logits, and the shape of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.attention import KVCache, KVCacheSpec
from wavetrain_engine.layers.embedding import Embedding, TiedEmbedding
from wavetrain_engine.layers.linear import OutputHead
from wavetrain_engine.layers.parameter import allocate_parameters
from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_kernels import ops
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens

# T = tokens of the step, H = hidden size, N = rows whose logits are wanted, V = vocabulary size.


class Model(nn.Module):
    """Base of the families. Holds shapes only until `allocate`; then memory, until the loader fills it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_model_len: int) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.device = device
        vocab_size, hidden_size, is_tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        embedding_class = TiedEmbedding if is_tied else Embedding
        self.embed_tokens = embedding_class(vocab_size, hidden_size, scale=self.embedding_scale(), dtype=dtype)
        self.lm_head = None if is_tied else OutputHead(hidden_size, vocab_size, dtype=dtype)

    def embedding_scale(self) -> float:
        """Returns what embeddings are multiplied by; Gemma has a factor here."""
        return 1.0

    def kv_cache_spec(self) -> KVCacheSpec:
        """Returns what the KV cache of this model is made of."""
        return KVCacheSpec(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
        )

    def allocate(self) -> None:
        """Gives weights uninitialised memory on the model's device, and computes the rotary table.

        What kernels pack, experts among it, gets its memory where it is loaded.
        """
        allocate_parameters(self, self.device)
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.allocate(self.device)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[KVCache],
        metadata: AttentionMetadata,
        wanted: WantedTokens | None = None,
    ) -> Tensor:
        """Takes input_ids [T], positions [T] and a KV cache for each layer, which it writes to.

        Returns the final hidden states [T, H], or [N, H] of the wanted tokens; the cache gets those of all.
        """
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits [N, V], in float32, of selected rows [N, H] of what `forward` returned."""
        output = self.embed_tokens.project if isinstance(self.embed_tokens, TiedEmbedding) else self.lm_head
        assert output is not None, "a model that is not tied has an output head"
        return output(hidden)


def select_wanted(x: Tensor, wanted: WantedTokens | None) -> Tensor:
    """Returns the rows of x [T, H] that are wanted; None: all of them."""
    return x if wanted is None else ops.select_rows(x, wanted.indices)
