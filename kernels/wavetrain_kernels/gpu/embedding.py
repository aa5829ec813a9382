# SPDX-License-Identifier: Apache-2.0
"""Looking up rows of an embedding table and scaling them, in one launch."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import TRITON_TYPES, cdiv, fall_back, launch
from wavetrain_kernels.reference import embedding as reference

# T = tokens, V = vocabulary size, H = hidden size.

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["token_ids_ptr"])
def _embedding_kernel(
    out_ptr,  # [T, H], contiguous
    table_ptr,  # [V, H]
    token_ids_ptr,  # [T]
    scale,
    stride_tv,
    SIZE: tl.constexpr,  # H
    IS_SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    values = tl.load(table_ptr + token_id * stride_tv + columns, mask=columns < SIZE, other=0.0)
    if IS_SCALED:
        values = (values.to(tl.float32) * scale).to(values.dtype)
    tl.store(out_ptr + row * SIZE + columns, values, mask=columns < SIZE)


def embedding(out: Tensor, table: Tensor, token_ids: Tensor, scale: float, is_packed: bool) -> None:
    """out [T, H] = rows of the table times scale. A packed table is the table."""
    if table.dtype not in TRITON_TYPES:
        fall_back("embedding", f"{table.dtype} tables")
        reference.embedding(out, table, token_ids, scale, is_packed)
        return
    num_rows, size = out.shape
    launch(
        _embedding_kernel,
        (num_rows, cdiv(size, _BLOCK)),
        out,
        table,
        token_ids.contiguous(),
        scale,
        table.stride(0),
        SIZE=size,
        IS_SCALED=scale != 1.0,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def aot_cases() -> Iterator[AotCase]:
    """Hidden sizes of the families we serve, one that is odd."""
    for dtype, size, is_scaled in (
        ("bf16", 855, False),
        ("bf16", 896, False),
        ("bf16", 2304, True),
        ("bf16", 4096, False),
        ("fp16", 4096, False),
        ("fp32", 4096, False),
    ):
        yield AotCase(
            f"embedding/{dtype}/{size}{'/scaled' if is_scaled else ''}",
            _embedding_kernel,
            {
                "out_ptr": f"*{dtype}",
                "table_ptr": f"*{dtype}",
                "token_ids_ptr": "*i64",
                "scale": "fp32",
                "stride_tv": "i32:16" if size % 16 == 0 else "i32",
            },
            {"SIZE": size, "IS_SCALED": is_scaled, "BLOCK": _BLOCK},
            _NUM_WARPS,
            1,
            is_decode=True,
        )
