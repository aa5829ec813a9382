# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a given token and of the likeliest ones, in order, after one pass over the logits.

The pass leaves each group's maximum and weight, and how many logits are larger than the token's: its rank. One program
a row then takes the k largest one after the other: it holds, for each group, the largest that was not taken yet, and
after each that it takes reads that one group again.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import cdiv, fall_back, launch, next_power_of_2
from wavetrain_kernels.gpu.vocab_groups import (
    GROUP,
    GROUPS_PER_PROGRAM,
    INFINITY,
    aot_kinds,
    group_block,
    is_supported,
    order_key,
    vocab_groups,
    whole_rows,
)
from wavetrain_kernels.reference import sampling as reference
from wavetrain_kernels.reference.gumbel import GROUP_SIZE

# N = rows, V = vocabulary size, G = groups, P = programs of a row.

# Each token that is taken costs about a microsecond; a sort of the row costs less than so many.
_MOST_TAKEN = 1024
_NUM_WARPS = 4
_NOTHING = tl.constexpr(-(2**63))


def top_logprobs(ids: Tensor, logprobs: Tensor, ranks: Tensor, logits: Tensor, token_ids: Tensor) -> None:
    """See KernelSet. Of equals the smaller token comes first."""
    k = ids.shape[1] - 1
    if not is_supported(logits) or k > _MOST_TAKEN:
        fall_back("top_logprobs", f"k over {_MOST_TAKEN}" if is_supported(logits) else str(logits.dtype))
        reference.top_logprobs(ids, logprobs, ranks, logits, token_ids)
        return
    logits, token_ids = whole_rows(logits), token_ids.contiguous()
    num_rows, vocab_size = logits.shape
    groups = vocab_groups(logits, token_ids=token_ids)
    num_parts = groups.num_larger.shape[1]
    launch(
        _top_logprobs_kernel,
        (num_rows,),
        ids,
        logprobs,
        ranks,
        logits,
        token_ids,
        groups.maxima,
        groups.sums,
        groups.num_larger,
        k,
        vocab_size,
        groups.num_groups,
        num_parts,
        logits.stride(0),
        BLOCK_G=group_block(groups.num_groups),
        BLOCK_P=next_power_of_2(num_parts),
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _sort_keys(row_ptr, group, vocab_size):
    """Returns int64 that order a group's tokens by logit and, of equals, the smaller token first."""
    columns = group * GROUP + tl.arange(0, GROUP)
    is_token = columns < vocab_size
    x = tl.load(row_ptr + columns, mask=is_token, other=-INFINITY).to(tl.float32)
    keys = (order_key(x).to(tl.int64) << 32) | (0xFFFFFFFF - columns.to(tl.int64))  # pyright: ignore
    return tl.where(is_token, keys, _NOTHING)


@triton.jit(
    do_not_specialize=["k"],
    do_not_specialize_on_alignment=[
        "ids_ptr", "logprobs_ptr", "ranks_ptr", "token_ids_ptr", "maxima_ptr", "sums_ptr", "num_larger_ptr"
    ],
)  # fmt: skip
def _top_logprobs_kernel(
    ids_ptr,  # [N, 1 + k]
    logprobs_ptr,  # [N, 1 + k]
    ranks_ptr,  # [N]
    logits_ptr,  # [N, V]
    token_ids_ptr,  # [N]
    maxima_ptr,  # [N, G]
    sums_ptr,  # [N, G]
    num_larger_ptr,  # [N, P]
    k,
    vocab_size,
    num_groups,
    num_parts,
    stride_xn,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_xn
    ids_ptr += row * (k + 1)
    logprobs_ptr += row * (k + 1)
    parts = tl.arange(0, BLOCK_P)
    num_larger = tl.load(num_larger_ptr + row * num_parts + parts, mask=parts < num_parts, other=0)
    tl.store(ranks_ptr + row, 1 + tl.sum(num_larger, axis=0).to(tl.int64))

    groups = tl.arange(0, BLOCK_G)
    is_group = groups < num_groups
    maxima = tl.load(maxima_ptr + row * num_groups + groups, mask=is_group, other=-INFINITY)
    sums = tl.load(sums_ptr + row * num_groups + groups, mask=is_group, other=0.0)
    has_nan = tl.max((maxima != maxima).to(tl.int32), axis=0) > 0
    most = tl.max(tl.where(maxima != maxima, INFINITY, maxima), axis=0)
    # A row with NaN or an infinite largest logit has no log-probabilities.
    is_valid = (not has_nan) & (most > -INFINITY) & (most < INFINITY)
    difference = tl.where(is_valid & (sums > 0.0), maxima - most, 0.0)
    log_total = tl.where(is_valid, tl.log(tl.sum(sums * tl.exp(difference), axis=0)), float("nan"))

    token_id = tl.load(token_ids_ptr + row)
    tl.store(ids_ptr, token_id)
    tl.store(logprobs_ptr, tl.load(row_ptr + token_id).to(tl.float32) - most - log_total)

    # A group's best that was not looked for yet counts as its first token: it comes after no equal of a later group.
    best = (order_key(maxima).to(tl.int64) << 32) | (0xFFFFFFFF - groups.to(tl.int64) * GROUP)  # pyright: ignore
    best = tl.where(is_group, best, _NOTHING)
    for place in range(1, k + 1):
        bound = tl.max(best, axis=0)
        group = ((0xFFFFFFFF - (bound & 0xFFFFFFFF)) // GROUP).to(tl.int32)
        keys = _sort_keys(row_ptr, group, vocab_size)
        taken = tl.max(tl.where(keys <= bound, keys, _NOTHING), axis=0)  # pyright: ignore[reportOptionalOperand]
        rest = tl.max(tl.where(keys < taken, keys, _NOTHING), axis=0)  # pyright: ignore[reportOptionalOperand]
        best = tl.where(groups == group, rest, best)
        token_id = 0xFFFFFFFF - (taken & 0xFFFFFFFF)
        tl.store(ids_ptr + place, token_id)
        tl.store(logprobs_ptr + place, tl.load(row_ptr + token_id).to(tl.float32) - most - log_total)


def aot_cases() -> Iterator[AotCase]:
    """See AotCase."""
    for dtype, num_groups in aot_kinds(lambda size: cdiv(size, GROUP_SIZE)):
        yield AotCase(
            name=f"logprobs/{dtype}/{num_groups}",
            kernel=_top_logprobs_kernel,
            signature={
                "ids_ptr": "*i64",
                "logprobs_ptr": "*fp32",
                "ranks_ptr": "*i64",
                "logits_ptr": f"*{dtype}",
                "token_ids_ptr": "*i64",
                "maxima_ptr": "*fp32",
                "sums_ptr": "*fp32",
                "num_larger_ptr": "*i32",
                "k": "i32",
                "vocab_size": "i32:16",
                "num_groups": "i32",
                "num_parts": "i32",
                "stride_xn": "i32:16",
            },
            constexprs={
                "BLOCK_G": group_block(num_groups),
                "BLOCK_P": next_power_of_2(cdiv(num_groups, GROUPS_PER_PROGRAM)),
            },
            num_warps=_NUM_WARPS,
            num_stages=3,
            is_decode=True,
        )
