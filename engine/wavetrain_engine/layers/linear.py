# SPDX-License-Identifier: Apache-2.0
"""Projections. Matrices that read the same input are one matrix, so that a step reads its input once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wavetrain_engine.layers.parameter import PackedModule, empty_parameter
from wavetrain_kernels import ops


class Linear(PackedModule):
    """x [T, in] → [T, out]. The only caller of `ops.linear` for projections; other weight formats plug in here."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features, dtype=dtype)
        self.bias = empty_parameter(out_features, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns x times the weight transposed, plus the bias."""
        return ops.linear(x, self.packed, self.bias)


class MergedLinear(Linear):
    """Several projections of one input, stacked by rows.

    Attributes:
        parts: name of each projection in a checkpoint (a sibling of this module's own name) → its rows, in
            the order they are stacked.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype)
        self.parts = dict(parts)


class GatedLinear(MergedLinear):
    """Gates and what they gate, as one projection: x [T, in] → act(gate(x)) * up(x) [T, out]."""

    is_gated = True

    def __init__(
        self, in_features: int, out_features: int, activation: ops.GatedActivation, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, {"gate_proj": out_features, "up_proj": out_features}, bias=bias, dtype=dtype)
        self._activation: ops.GatedActivation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gated units."""
        return ops.gated_linear(x, self.packed, self._activation, self.bias)


class OutputHead(Linear):
    """Final hidden states [N, in] → logits [N, out] in float32, as they are summed."""

    def __init__(self, in_features: int, vocab_size: int, *, dtype: torch.dtype) -> None:
        super().__init__(in_features, vocab_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return ops.linear(x, self.packed, dtype=torch.float32)
