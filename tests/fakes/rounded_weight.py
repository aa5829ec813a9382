# SPDX-License-Identifier: Apache-2.0
"""Rounding a weight to nearest, and packing codes into int32s one by one: plain, and independent of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# N = rows, K = columns, G = groups of columns.

FLOAT8_LARGEST = 448.0


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] as (codes - zeros) * scales.

    Attributes:
        codes: [N, K] int32, from 0 to 2 ** bits - 1.
        scales: [N, G] float32.
        zeros: [N, G] int32, in codes.
        groups: [K]: the group of each column.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def dequantize(self) -> Tensor:
        return (self.codes - self.zeros[:, self.groups]).float() * self.scales[:, self.groups]


def round_integers(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    *,
    is_symmetric: bool = True,
    order_seed: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Rounded:
    """Rounds to nearest; with `order_seed`, columns fall into groups in a random order."""
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    groups = torch.arange(columns) // size
    if order_seed is not None:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(order_seed))]
    num_groups, top, half = int(groups.max()) + 1, 2**bits - 1, 2 ** (bits - 1)
    scales, zeros = torch.zeros(rows, num_groups), torch.full((rows, num_groups), half, dtype=torch.int32)
    for group in range(num_groups):
        part = weight[:, groups == group]
        if is_symmetric:
            scales[:, group] = part.abs().amax(1) / (half - 0.5)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = (-low / scales[:, group].where(high > low, 1.0)).round().clamp(0, top).int()
    scales = scales.to(scale_dtype).float()
    codes = (weight / scales.where(scales > 0, 1.0)[:, groups]).round() + zeros[:, groups]
    return Rounded(bits, codes.clamp(0, top).int(), scales, zeros, groups)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Returns [N, ceil(K * bits / 32)] int32: codes [N, K] side by side, the first in the lowest bits."""
    rows, columns = codes.shape
    per_word = 32 // bits
    words = torch.zeros(rows, -(-columns // per_word), dtype=torch.int64)
    for column in range(columns):
        words[:, column // per_word] |= codes[:, column].long() << (bits * (column % per_word))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def round_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns float8 values [N, K] and the scale of each block, rows by columns."""
    rows, columns = weight.shape
    height, width = block
    grid = (-(-rows // height), -(-columns // width))
    scales = torch.zeros(grid)
    values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            where = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[where].abs().max() / FLOAT8_LARGEST
            values[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def dequantize_float8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Returns the numbers [N, K] in float32."""
    rows, columns = values.shape
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.float() * spread
