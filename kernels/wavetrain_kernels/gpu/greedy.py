# SPDX-License-Identifier: Apache-2.0
"""The likeliest token of each row: its logits are divided among programs, whose finds a second kernel compares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import TRITON_TYPES, cdiv, fall_back, launch, next_power_of_2
from wavetrain_kernels.gpu.vocab_groups import (
    INFINITY,
    LOWEST_KEY,
    aot_kinds,
    from_order_key,
    is_supported,
    order_key,
    whole_rows,
)
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.reference import sampling as reference

# N = rows, V = vocabulary size, P = programs of a row.

# 16 kB of float32: enough loads in flight, and enough programs from one row on.
_BLOCK = 4096
_NUM_WARPS = 8


def sample_greedy(token_ids: Tensor, best: Tensor, logits: Tensor) -> None:
    """See KernelSet. Of equals the first; NaN counts as largest."""
    if not is_supported(logits):
        fall_back("sample_greedy", str(logits.dtype))
        reference.sample_greedy(token_ids, best, logits)
        return
    logits = whole_rows(logits)
    num_rows, vocab_size = logits.shape
    num_programs = cdiv(vocab_size, _BLOCK)
    found = workspace("greedy", (num_rows, num_programs), torch.int64, logits.device)
    launch(
        _partial_greedy_kernel,
        (num_programs, num_rows),
        found,
        logits,
        vocab_size,
        logits.stride(0),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    launch(
        _greedy_kernel,
        (num_rows,),
        token_ids,
        best,
        found,
        num_programs,
        BLOCK_P=next_power_of_2(num_programs),
        num_warps=1,
    )


@triton.jit
def _partial_greedy_kernel(
    found_ptr,  # [N, P]
    logits_ptr,  # [N, V]
    vocab_size,
    stride_xn,
    BLOCK: tl.constexpr,
):
    """One part of a row: the key of its largest logit, and below it 2^32 - 1 minus where that is first."""
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    columns = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride_xn + columns, mask=columns < vocab_size, other=-INFINITY).to(tl.float32)
    keys = tl.where(columns < vocab_size, order_key(x), LOWEST_KEY)
    key = tl.max(keys, axis=0)
    first = tl.min(tl.where(keys == key, columns, vocab_size), axis=0)
    found = (key.to(tl.int64) << 32) | (0xFFFFFFFF - first.to(tl.int64))
    tl.store(found_ptr + row * tl.num_programs(0) + program, found)


@triton.jit(do_not_specialize_on_alignment=["token_ids_ptr", "best_ptr"])
def _greedy_kernel(
    token_ids_ptr,  # [N]
    best_ptr,  # [N]
    found_ptr,  # [N, P]
    num_programs,
    BLOCK_P: tl.constexpr,
):
    """The largest of a row's parts."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK_P)
    found = tl.load(found_ptr + row * num_programs + parts, mask=parts < num_programs, other=-(2**63))
    most = tl.max(found, axis=0)
    tl.store(token_ids_ptr + row, 0xFFFFFFFF - (most & 0xFFFFFFFF))
    tl.store(best_ptr + row, from_order_key((most >> 32).to(tl.int32)).to(best_ptr.dtype.element_ty))


def aot_cases() -> Iterator[AotCase]:
    """See AotCase."""
    for dtype in TRITON_TYPES.values():
        yield AotCase(
            name=f"greedy/parts/{dtype}",
            kernel=_partial_greedy_kernel,
            signature={"found_ptr": "*i64", "logits_ptr": f"*{dtype}", "vocab_size": "i32:16", "stride_xn": "i32:16"},
            constexprs={"BLOCK": _BLOCK},
            num_warps=_NUM_WARPS,
            num_stages=3,
            is_decode=True,
        )
    for dtype, block in aot_kinds(lambda size: next_power_of_2(cdiv(size, _BLOCK))):
        yield AotCase(
            name=f"greedy/row/{dtype}/{block}",
            kernel=_greedy_kernel,
            signature={
                "token_ids_ptr": "*i64",
                "best_ptr": f"*{dtype}",
                "found_ptr": "*i64",
                "num_programs": "i32",
            },
            constexprs={"BLOCK_P": block},
            num_warps=1,
            num_stages=3,
            is_decode=True,
        )
