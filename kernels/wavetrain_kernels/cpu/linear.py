# SPDX-License-Identifier: Apache-2.0
"""Linear layers over weights packed once at load; bfloat16. Other dtypes go to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.cpu.memory import HugePool
from wavetrain_kernels.reference import linear as reference

# M = rows, K = inputs, N = outputs.

_TILE, _DEPTH, _PANEL, _BLOCK = 16, 32, 32, 32
_ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}


class LinearKernels:
    """The linear functions of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._memory = HugePool()

    def pack_weight(self, weight: Tensor, is_gated: bool) -> Tensor:
        """Returns weight [N, K] in panels, in memory of its own: see source/linear.h."""
        if weight.dtype != torch.bfloat16:
            return reference.pack_weight(weight, is_gated)
        num_outputs, num_inputs = weight.shape
        panels = _ceil_div(num_outputs // 2, _TILE) if is_gated else _ceil_div(num_outputs, _PANEL)
        packed = self._memory.empty(panels * _ceil_div(num_inputs, _DEPTH) * _PANEL * _DEPTH, torch.bfloat16)
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self._library.pack_weight(
            packed.data_ptr(), weight.data_ptr(), weight.stride(0), num_outputs, num_inputs, is_gated
        )
        return packed

    def linear(self, out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
        """out [M, N] = x [M, K] times the packed weight transposed, plus bias [N]; out is bfloat16 or float32."""
        if x.dtype != torch.bfloat16:
            reference.linear(out, x, packed, bias)
        else:
            self._run(out, x, packed, bias, out.shape[1], 0)

    def gated_linear(self, out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> None:
        """out [M, N / 2] = act(first half of the outputs) times the second half."""
        if x.dtype != torch.bfloat16:
            reference.gated_linear(out, x, packed, bias, activation)
        else:
            self._run(out, x, packed, bias, 2 * out.shape[1], _ACTIVATIONS[activation])

    def _run(
        self, out: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int, activation: int
    ) -> None:
        num_rows, num_inputs = x.shape
        if not num_rows:
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        padded = _ceil_div(num_rows, _BLOCK) * _BLOCK * _ceil_div(num_inputs, _DEPTH) * _DEPTH
        self._library.linear(
            out.data_ptr(),
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self._library.scratch(padded * 2),
            out.stride(0),
            x.stride(0),
            num_rows,
            num_inputs,
            num_outputs,
            activation,
            out.dtype == torch.float32,
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
