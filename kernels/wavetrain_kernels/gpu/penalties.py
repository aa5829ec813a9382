# SPDX-License-Identifier: Apache-2.0
"""Penalties on the tokens that a row has seen: all are read before any is written, as one may be listed twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, launch
from wavetrain_kernels.gpu.workspace import workspace

# N = rows, V = vocabulary size, L = tokens of the longest row.

_BLOCK = 1024
_NUM_WARPS = 4


def apply_penalties(
    logits: Tensor, token_ids: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """See KernelSet. Two launches: a barrier within one would keep a row's tokens in one program."""
    num_rows, num_tokens = token_ids.shape
    token_ids, output_counts = token_ids.contiguous(), output_counts.contiguous()
    penalized = workspace("penalties", (num_rows, num_tokens), torch.float32, logits.device)
    grid = (cdiv(num_tokens, _BLOCK), num_rows)
    launch(
        _penalize_kernel,
        grid,
        penalized,
        logits,
        token_ids,
        output_counts,
        repetition,
        presence,
        frequency,
        num_tokens,
        logits.stride(0),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    launch(
        _write_kernel,
        grid,
        logits,
        penalized,
        token_ids,
        num_tokens,
        logits.stride(0),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=[
        "penalized_ptr", "logits_ptr", "token_ids_ptr", "counts_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr"
    ],
)  # fmt: skip
def _penalize_kernel(
    penalized_ptr,  # [N, L]
    logits_ptr,  # [N, V]
    token_ids_ptr,  # [N, L]
    counts_ptr,  # [N, L]
    repetition_ptr,  # [N]
    presence_ptr,  # [N]
    frequency_ptr,  # [N]
    num_tokens,
    stride_xn,
    BLOCK: tl.constexpr,
):
    """What becomes of the logits of BLOCK tokens of a row."""
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = tokens < num_tokens
    places = row * num_tokens + tokens
    token_ids = tl.load(token_ids_ptr + places, mask=is_token, other=0)
    count = tl.load(counts_ptr + places, mask=is_token, other=0).to(tl.float32)
    x = tl.load(logits_ptr + row * stride_xn + token_ids, mask=is_token, other=0.0)
    repetition = tl.load(repetition_ptr + row)
    x = tl.where(x > 0.0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    presence = tl.where(count > 0.0, tl.load(presence_ptr + row), 0.0)
    x -= presence + tl.load(frequency_ptr + row) * count
    tl.store(penalized_ptr + places, x, mask=is_token)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["logits_ptr", "penalized_ptr", "token_ids_ptr"],
)
def _write_kernel(
    logits_ptr,  # [N, V]
    penalized_ptr,  # [N, L]
    token_ids_ptr,  # [N, L]
    num_tokens,
    stride_xn,
    BLOCK: tl.constexpr,
):
    """Puts them back. A token that is listed again is written again, with the same value."""
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = tokens < num_tokens
    places = row * num_tokens + tokens
    token_ids = tl.load(token_ids_ptr + places, mask=is_token, other=0)
    x = tl.load(penalized_ptr + places, mask=is_token, other=0.0)
    tl.store(logits_ptr + row * stride_xn + token_ids, x, mask=is_token)


def aot_cases() -> Iterator[AotCase]:
    """See AotCase."""
    common = {"kernel": _penalize_kernel, "num_warps": _NUM_WARPS, "num_stages": 3, "is_decode": True}
    sizes = {"num_tokens": "i32", "stride_xn": "i32:16"}
    yield AotCase(
        name="penalties/compute",
        signature={
            "penalized_ptr": "*fp32",
            "logits_ptr": "*fp32",
            "token_ids_ptr": "*i64",
            "counts_ptr": "*i32",
            "repetition_ptr": "*fp32",
            "presence_ptr": "*fp32",
            "frequency_ptr": "*fp32",
            **sizes,
        },
        constexprs={"BLOCK": _BLOCK},
        **common,
    )
    yield AotCase(
        name="penalties/write",
        signature={"logits_ptr": "*fp32", "penalized_ptr": "*fp32", "token_ids_ptr": "*i64", **sizes},
        constexprs={"BLOCK": _BLOCK},
        **{**common, "kernel": _write_kernel},
    )
