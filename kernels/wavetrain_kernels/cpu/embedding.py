# SPDX-License-Identifier: Apache-2.0
"""Looking up rows, of a table, plain or packed, or of a step; bfloat16. Other dtypes go to the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.reference import embedding as reference
from wavetrain_kernels.reference import rows as reference_rows


class EmbeddingKernels:
    """The look-up of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def embedding(self, out: Tensor, table: Tensor, token_ids: Tensor, scale: float, is_packed: bool) -> None:
        """out [T, H] = rows of the table times scale."""
        if out.dtype != torch.bfloat16:
            reference.embedding(out, table, token_ids, scale, is_packed)
            return
        token_ids = token_ids.contiguous()
        self._library.embedding(
            out.data_ptr(),
            table.data_ptr(),
            token_ids.data_ptr(),
            token_ids.shape[0],
            out.shape[1],
            scale,
            is_packed,
        )

    def select_rows(self, out: Tensor, x: Tensor, indices: Tensor) -> None:
        """out [N, ...] = rows of x [T, ...]."""
        if out.dtype != torch.bfloat16:
            reference_rows.select_rows(out, x, indices)
            return
        indices = indices.contiguous()
        num_rows = indices.shape[0]
        size = math.prod(out.shape[1:])
        self._library.select_rows(out.data_ptr(), x.data_ptr(), indices.data_ptr(), num_rows, size)
