# SPDX-License-Identifier: Apache-2.0
"""Linear layers by cuBLAS, which writes each product where it is wanted; gates of a few rows by a kernel of our own.

A packed weight is the weight itself.
Its layout [out, in] is the one that cuBLAS reads fastest for few rows: both operands run along the summed dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.gpu.activation import gated_activation
from wavetrain_kernels.gpu.gated_product import can_fuse, gated_product
from wavetrain_kernels.gpu.launch import TRITON_TYPES, fall_back
from wavetrain_kernels.reference import linear as reference


def pack_weight(weight: Tensor, _is_gated: bool) -> Tensor:
    """Returns the weight, its rows lying together."""
    return weight if weight.stride(-1) == 1 else weight.contiguous()


def linear(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
    """out [T, N] = x @ weight.T + bias. A float32 `out` takes the sums as they are, before any rounding."""
    if out.dtype != x.dtype:
        _wide_product(out, x, packed)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(x, packed.t(), out=out)
    else:
        torch.addmm(bias, x, packed.t(), out=out)  # the bias is added before the sums are rounded


def _wide_product(out: Tensor, x: Tensor, packed: Tensor) -> None:
    if x.device.type == "cuda":
        torch.mm(x, packed.t(), out_dtype=out.dtype, out=out)
    else:  # the interpreter; torch has this product on GPUs alone
        torch.mm(x.to(out.dtype), packed.t().to(out.dtype), out=out)


def gated_linear(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> None:
    """out [T, N / 2] = act(first half) * second half of x @ weight.T + bias."""
    if x.dtype not in TRITON_TYPES:
        fall_back("gated_linear", f"{x.dtype} inputs")
        reference.gated_linear(out, x, packed, bias, activation)
        return
    if can_fuse(x, packed):
        gated_product(out, x, packed, bias, activation)
        return
    # Of torch's allocator and not a workspace: as large as any activation, and free for the next layer right after.
    gate_up = torch.empty((x.shape[0], packed.shape[0]), dtype=x.dtype, device=x.device)
    linear(gate_up, x, packed, bias)
    gated_activation(out, gate_up, activation)
