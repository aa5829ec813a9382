# SPDX-License-Identifier: Apache-2.0
"""Gated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    """out [T, I] = silu(first half of x) * second half of x."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def gelu_tanh_and_mul(out: Tensor, x: Tensor) -> None:
    """out [T, I] = gelu(first half of x, tanh approximation) * second half of x."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)
