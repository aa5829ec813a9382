# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalization with a learned scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.parameter import empty_parameter
from wavetrain_kernels import ops


class RMSNorm(nn.Module):
    """Scales rows [..., H] to unit root-mean-square, then by weight + weight_offset."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype)
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized x."""
        return ops.rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (normalized x + residual, x + residual); without a residual yet, x begins it."""
        if residual is None:
            return self.forward(x), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps, weight_offset=self.weight_offset)
