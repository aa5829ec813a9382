# SPDX-License-Identifier: Apache-2.0
"""The parts of a row's attention that several programs computed, put together by their log-sum-exp.

Part i has the output o_i, divided by its sum, and the logarithm l_i of its sum; the whole is the mean of the o_i with
weights exp(l_i) (Flash-Decoding, Dao et al. 2023). Logarithms are of base 2, as the exponentials are.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.attention_decode_config import MAX_DECODE_QUERY_LEN, DecodeConfig, DecodeShape
from wavetrain_kernels.gpu.launch import cdiv, launch

# B = rows, T = tokens in the step, Hq = query heads, Hkv = key-value heads, D = head dimension, P = programs per head.
# A row of BLOCK_M is one query head of one token: m = token * GROUP + head within its group.

MAX_QUERY_LEN = tl.constexpr(MAX_DECODE_QUERY_LEN)
# Below every score, yet finite: the difference of two of these is no NaN.
LOWEST = tl.constexpr(-1e30)

_NUM_WARPS = 4


@triton.jit
def store_rows(
    out_ptr, acc, rows, dims, first_token, kv_head, num_valid, stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Writes rows m [M] of a tile [M, BLOCK_D] to the tokens and heads that they are."""
    offsets = (first_token + rows // GROUP).to(tl.int64) * stride_ot + (kv_head * GROUP + rows % GROUP) * stride_oh
    is_wanted = (rows < num_valid)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + offsets[:, None] + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_wanted)


@triton.jit
def merge_parts(
    out_ptr, part_ptr, lse_ptr, row_block, first_token, num_valid, first_program, last_program,
    kv_head, num_kv_heads, stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    MERGE_M: tl.constexpr, MERGE_P: tl.constexpr,
) -> None:  # fmt: skip
    """Writes MERGE_M rows from their parts, MERGE_P at a time, each weighted by exp2 of its log-sum-exp."""
    rows = row_block * MERGE_M + tl.arange(0, MERGE_M)
    dims = tl.arange(0, BLOCK_D)
    is_row = rows < num_valid
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    peak = tl.full([MERGE_M], LOWEST, tl.float32)
    total = tl.zeros([MERGE_M], tl.float32)
    acc = tl.zeros([MERGE_M, BLOCK_D], tl.float32)
    for begin in range(first_program, last_program + 1, MERGE_P):
        programs = begin + tl.arange(0, MERGE_P)
        is_part = programs <= last_program
        # Written by other multiprocessors: read past this one's own cache.
        slots = (2 * programs + (programs == first_program).to(tl.int32)) * num_kv_heads + kv_head
        at = slots[:, None] * BLOCK_M + rows[None, :]
        lse = tl.load(lse_ptr + at, mask=is_part[:, None] & is_row[None, :], other=float("-inf"), cache_modifier=".cg")
        parts = tl.load(
            part_ptr + at[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=is_part[:, None, None] & is_element[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weights = tl.exp2(lse - new_peak[None, :])
        kept = tl.exp2(peak - new_peak)
        total = total * kept + tl.sum(weights, 0)
        acc = acc * kept[:, None] + tl.sum(weights[:, :, None] * parts, 0)
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out_ptr, acc, rows, dims, first_token, kv_head, num_valid, stride_ot, stride_oh, GROUP, HEAD_DIM)


@triton.jit(do_not_specialize_on_alignment=["query_start_ptr"])
def _merge_kernel(
    out_ptr, part_ptr, lse_ptr, span_ptr, query_start_ptr,  # as above
    stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, MERGE_M: tl.constexpr, MERGE_P: tl.constexpr,
):  # fmt: skip
    """MERGE_M rows m of one row of the step and one key-value head, if several programs have parts of it."""
    row_block, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    first_token = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - first_token
    span_at = span_ptr + (row * num_kv_heads + kv_head) * 2
    first_program, last_program = tl.load(span_at), tl.load(span_at + 1)
    # Nobody wrote the span of a row that is not ours.
    if (query_len > 0) & (query_len <= MAX_QUERY_LEN) & (first_program < last_program):
        merge_parts(
            out_ptr, part_ptr, lse_ptr, row_block, first_token, query_len * GROUP, first_program, last_program,
            kv_head, num_kv_heads, stride_ot, stride_oh,
            GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, MERGE_M, MERGE_P,
        )  # fmt: skip


def launch_merge(
    out: Tensor,
    parts: Tensor,
    part_lse: Tensor,
    spans: Tensor,
    query_start_loc: Tensor,
    shape: DecodeShape,
    config: DecodeConfig,
) -> None:
    """Merges what the programs of decode attention left in parts and noted in spans, into out [T, Hq, D]."""
    launch(
        _merge_kernel,
        (cdiv(shape.max_query_len * shape.group, config.merge_m), shape.num_kv_heads, shape.num_rows),
        out,
        parts,
        part_lse,
        spans,
        query_start_loc,
        *out.stride()[:2],
        **merge_constants(shape, config),
        num_warps=_NUM_WARPS,
    )


def merge_constants(shape: DecodeShape, config: DecodeConfig) -> dict[str, Any]:
    """Returns the constexprs of `merge_parts` by name."""
    return {
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
        "MERGE_M": config.merge_m,
        "MERGE_P": config.merge_p,
    }


def merge_case(name: str, dtype: str, shape: DecodeShape, config: DecodeConfig) -> AotCase:
    """Returns the merging kernel of a configuration, to be compiled ahead of time."""
    signature = {"out_ptr": f"*{dtype}", "part_ptr": "*fp32", "lse_ptr": "*fp32", "span_ptr": "*i32"}
    signature |= {"query_start_ptr": "*i32", "stride_ot": "i32:16", "stride_oh": "i32:16"}
    return AotCase(
        name=name,
        kernel=_merge_kernel,
        signature=signature,
        constexprs=merge_constants(shape, config),
        num_warps=_NUM_WARPS,
        num_stages=1,
        is_decode=True,
    )
