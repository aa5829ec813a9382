# SPDX-License-Identifier: Apache-2.0
"""The gated feed-forward block: down(act(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.linear import GatedLinear, Linear
from wavetrain_kernels import ops

# Names as config.json spells them.
GATED_ACTIVATIONS: dict[str, ops.GatedActivation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class GatedMLP(nn.Module):
    """[T, H] → [T, H] through `intermediate_size` gated units."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, hidden_act: str, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        activation = GATED_ACTIVATIONS[hidden_act]
        self.gate_up_proj = GatedLinear(hidden_size, intermediate_size, activation, bias=bias, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype)

    @property
    def input_weight(self) -> ops.PackedWeight | None:
        """The only weight that reads this block's input; None: there are several."""
        return self.gate_up_proj.only_weight

    def forward(self, x: ops.Rows) -> Tensor:
        """Returns down(act(gate(x)) * up(x))."""
        return self.down_proj(self.gate_up_proj(x, self.down_proj.only_weight))
