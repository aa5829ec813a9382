# SPDX-License-Identifier: Apache-2.0
"""The gated feed-forward block: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.linear import Linear, MergedLinear
from wavetrain_kernels import ops

# Names as config.json spells them.
_GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu_and_mul,
    "gelu_pytorch_tanh": ops.gelu_tanh_and_mul,
}


class GatedMLP(nn.Module):
    """[T, H] → [T, H] through `intermediate_size` gated units."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, hidden_act: str, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(hidden_size, parts, bias=bias, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype)
        self._gated_activation = _GATED_ACTIVATIONS[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Returns down(act(gate(x)) * up(x))."""
        return self.down_proj(self._gated_activation(self.gate_up_proj(x)))
