# SPDX-License-Identifier: Apache-2.0
"""Token embeddings, and their use as the output projection where a model ties the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.parameter import PackedModule, empty_parameter
from wavetrain_kernels import ops


class Embedding(nn.Module):
    """Token ids [T] → rows [T, H] of the table [vocab_size, H]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size, dtype=dtype)
        self._scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the rows of `input_ids`, which must be below vocab_size, times the scale."""
        return ops.embedding(input_ids, self.weight, scale=self._scale)


class TiedEmbedding(PackedModule):
    """The table of a model that multiplies by it at the end too: held once, packed, and looked up from there."""

    def __init__(self, vocab_size: int, hidden_size: int, *, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size, dtype=dtype)
        self._scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the rows of `input_ids`, which must be below vocab_size, times the scale."""
        return ops.embedding(input_ids, self.packed, scale=self._scale)

    def project(self, hidden: Tensor) -> Tensor:
        """Returns hidden [N, H] times the table transposed: the logits [N, vocab_size], in float32."""
        return ops.linear(hidden, self.packed, dtype=torch.float32)
