# SPDX-License-Identifier: Apache-2.0
"""Gated activations: act(gate) * up, where gate and up are the halves of one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.ops.dispatch import implementation

# T = tokens in the step, I = intermediate size.


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns silu(x[:, :I]) * x[:, I:] as [T, I], from x [T, 2I].

    Raises:
        ShapeError: x is not [T, 2I].
        DtypeError: x is not floating point.
    """
    out = _output(x)
    implementation(x.device).silu_and_mul(out, x)
    return out


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """Returns gelu(x[:, :I]) * x[:, I:] as [T, I], from x [T, 2I], with the tanh approximation of gelu.

    Raises:
        ShapeError: x is not [T, 2I].
        DtypeError: x is not floating point.
    """
    out = _output(x)
    implementation(x.device).gelu_tanh_and_mul(out, x)
    return out


def _output(x: Tensor) -> Tensor:
    if x.dim() != 2 or x.shape[1] % 2:
        raise ShapeError(f"x must be [T, 2I], got {list(x.shape)}")
    if not x.is_floating_point():
        raise DtypeError(f"x must be floating point, got {x.dtype}")
    return torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
