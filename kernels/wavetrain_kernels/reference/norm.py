# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalization, in the rounding order of the Hugging Face models."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> None:
    """out [..., H] = x / rms(x) * (weight + weight_offset), accumulated in float32."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight_offset:  # Gemma: (x * w).to(dtype)
        torch.mul(x, weight.float() + weight_offset, out=out)
    else:  # Llama: x.to(dtype) * w
        torch.mul(x.to(out.dtype), weight, out=out)


def add_rms_norm(
    out: Tensor, residual_out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> None:
    """residual_out = x + residual, rounded; out = rms_norm(residual_out)."""
    torch.add(x, residual, out=residual_out)
    rms_norm(out, residual_out, weight, eps, weight_offset)
