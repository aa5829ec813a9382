# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalization with a learned scale."""

from __future__ import annotations

from typing import overload

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

    @overload
    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]: ...
    @overload
    def add(
        self, x: Tensor, residual: Tensor | None, inputs_for: ops.PackedWeight | None
    ) -> tuple[ops.Rows, Tensor]: ...
    def add(
        self, x: Tensor, residual: Tensor | None, inputs_for: ops.PackedWeight | None = None
    ) -> tuple[ops.Rows, Tensor]:
        """Returns (normalized x + residual, x + residual); without a residual yet, x begins it.

        Args:
            inputs_for: the weight that will read what is normalized, if it is the only one.
        """
        weight, eps, offset = self.weight, self.eps, self.weight_offset
        if residual is None:
            return ops.rms_norm(x, weight, eps, weight_offset=offset, inputs_for=inputs_for), x
        return ops.add_rms_norm(x, residual, weight, eps, weight_offset=offset, inputs_for=inputs_for)
