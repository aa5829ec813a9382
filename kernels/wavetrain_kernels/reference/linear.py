# SPDX-License-Identifier: Apache-2.0
"""Linear layers. A packed weight is the weight itself."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from wavetrain_kernels.reference.activation import gated_activation


def pack_weight(weight: Tensor, _is_gated: bool) -> Tensor:
    """Returns the weight."""
    return weight


def linear(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
    """out [T, N] = x @ weight.T + bias."""
    out.copy_(F.linear(x, packed, bias))


def gated_linear(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> None:
    """out [T, N / 2] = act(first half) * second half of x @ weight.T + bias."""
    gate, up = F.linear(x, packed, bias).chunk(2, dim=-1)
    out.copy_(gated_activation(gate, up, activation))
