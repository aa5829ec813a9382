# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalization in bfloat16 and float32. Other dtypes go to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.reference import norm as reference

# H = size of the normalized dimension.

_IS_BF16 = {torch.bfloat16: True, torch.float32: False}


class NormKernels:
    """The normalizations of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> None:
        """out [..., H] = x / rms(x) * (weight + weight_offset). Heads that lie apart are not copied together."""
        if x.dtype not in _IS_BF16:
            reference.rms_norm(out, x, weight, eps, weight_offset)
            return
        if x.dim() not in (2, 3) or x.stride(-1) != 1:
            x = x.reshape(-1, x.shape[-1]).contiguous()
        inner = x.shape[1] if x.dim() == 3 else 1
        self._run(out, None, x, None, weight, x.shape[0], inner, x.stride(0), x.stride(-2), eps, weight_offset)

    def add_rms_norm(
        self,
        out: Tensor,
        residual_out: Tensor,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_offset: float,
    ) -> None:
        """residual_out = x + residual, rounded; out = rms_norm(residual_out)."""
        if x.dtype not in _IS_BF16:
            reference.add_rms_norm(out, residual_out, x, residual, weight, eps, weight_offset)
            return
        size = weight.shape[0]
        rows = x.numel() // size if size else 0
        x, residual = x.contiguous(), residual.contiguous()
        self._run(out, residual_out, x, residual, weight, rows, 1, size, 0, eps, weight_offset)

    def _run(
        self,
        out: Tensor,
        residual_out: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        outer: int,
        inner: int,
        outer_stride: int,
        inner_stride: int,
        eps: float,
        weight_offset: float,
    ) -> None:
        weight = weight.contiguous()
        self._library.rms_norm(
            out.data_ptr(),
            None if residual_out is None else residual_out.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            outer,
            inner,
            outer_stride,
            inner_stride,
            weight.shape[0],
            eps,
            weight_offset,
            _IS_BF16[x.dtype],
        )
