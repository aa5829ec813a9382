# SPDX-License-Identifier: Apache-2.0
"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Returns act(gate) * up."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
