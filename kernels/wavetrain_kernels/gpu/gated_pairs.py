# SPDX-License-Identifier: Apache-2.0
"""act(gate) * up, of gates that lie beside what they gate: as quantized weights, whose rows are paired, leave them."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.activation import activated
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, launch

# T = tokens, I = intermediate size.

_BLOCK = 512
_NUM_WARPS = 4  # eight elements a thread: 16-byte loads in 16-bit types


@triton.jit
def _gated_pairs_kernel(
    out_ptr,  # [T, I], contiguous
    pairs_ptr,  # [T, I, 2], contiguous
    SIZE: tl.constexpr,  # I
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(pairs_ptr + row * (2 * SIZE) + places, mask=places < 2 * SIZE, other=0.0)
    gate, up = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * SIZE + columns, activated(gate, up, IS_SILU), mask=columns < SIZE)


def gated_pairs(out: Tensor, pairs: Tensor, activation: str) -> None:
    """out [T, I] = act(gate) * up, where pairs [T, 2 I] has each gate beside what it gates; both contiguous."""
    num_rows, size = out.shape
    launch(
        _gated_pairs_kernel,
        (num_rows, cdiv(size, _BLOCK)),
        out,
        pairs,
        SIZE=size,
        IS_SILU=activation == "silu",
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def aot_cases() -> Iterator[AotCase]:
    """A size of the families we serve, and one that is odd."""
    for dtype, size, is_silu in (("bf16", 14336, True), ("fp16", 855, False)):
        pointers = {"out_ptr": f"*{dtype}", "pairs_ptr": f"*{dtype}"}
        constexprs = {"SIZE": size, "IS_SILU": is_silu, "BLOCK": _BLOCK}
        yield AotCase(f"gated_pairs/{dtype}/{size}", _gated_pairs_kernel, pointers, constexprs, _NUM_WARPS, 1)
