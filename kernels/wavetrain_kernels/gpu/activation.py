# SPDX-License-Identifier: Apache-2.0
"""The middle of a gated MLP: act(gate) * up, of the two halves that one matrix product leaves side by side."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, launch

# T = tokens, I = intermediate size.

_BLOCK = 1024
_NUM_WARPS = 4  # eight elements a thread: 16-byte loads in 16-bit types


@triton.jit
def activated(gate, up, IS_SILU: tl.constexpr):  # noqa: ANN201
    """act(gate) * up, computed in float32 and rounded between the two as the reference is."""
    x = gate.to(tl.float32)
    # gelu's tanh approximation, 0.5 x (1 + tanh(z)), is a sigmoid too: 1 + tanh(z) = 2 sigmoid(2 z)
    active = x * tl.sigmoid(x if IS_SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x))
    return (active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _gated_activation_kernel(
    out_ptr,  # [T, I], contiguous
    gate_up_ptr,  # [T, 2 * I], contiguous
    SIZE: tl.constexpr,  # I
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < SIZE
    gate = tl.load(gate_up_ptr + row * (2 * SIZE) + columns, mask=is_there, other=0.0)
    up = tl.load(gate_up_ptr + row * (2 * SIZE) + SIZE + columns, mask=is_there, other=0.0)
    tl.store(out_ptr + row * SIZE + columns, activated(gate, up, IS_SILU), mask=is_there)


def gated_activation(out: Tensor, gate_up: Tensor, activation: str) -> None:
    """out [T, I] = act(gate) * up, where gate and up are the halves of gate_up [T, 2 I]; both contiguous."""
    num_rows, size = out.shape
    launch(
        _gated_activation_kernel,
        (num_rows, cdiv(size, _BLOCK)),
        out,
        gate_up,
        SIZE=size,
        IS_SILU=activation == "silu",
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def aot_cases() -> Iterator[AotCase]:
    """Intermediate sizes of the families we serve, one that is odd."""
    sizes = (("bf16", 855), ("bf16", 4864), ("bf16", 14336), ("fp16", 14336), ("fp32", 14336))
    for (dtype, size), is_silu in ((case, is_silu) for case in sizes for is_silu in (True, False)):
        yield AotCase(
            f"gated_activation/{dtype}/{size}/{'silu' if is_silu else 'gelu_tanh'}",
            _gated_activation_kernel,
            {"out_ptr": f"*{dtype}", "gate_up_ptr": f"*{dtype}"},
            {"SIZE": size, "IS_SILU": is_silu, "BLOCK": _BLOCK},
            _NUM_WARPS,
            1,
            is_decode=True,
        )
