# SPDX-License-Identifier: Apache-2.0
"""From codes side by side in larger integers to the values of a `QuantizedWeight`, and their columns in another order.

The int32s of checkpoints are little-endian: of 8 codes of 4 bits the first is in the low half of the first byte, as in
int4 values. So most formats need no more than another view of their bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# N = rows, K = columns of a weight.


def as_bytes(packed: Tensor) -> Tensor:
    """Returns the bytes of each row [N, K] of integers."""
    # Through one dimension: rows of one element may count as contiguous with any distance between them.
    return packed.contiguous().view(-1).view(torch.uint8).view(packed.shape[0], -1)


def int4_values(packed: Tensor, columns: int) -> Tensor:
    """Returns values [N, ceil(K / 2)] uint8 of codes 0 to 15 in int32s [N, ceil(K / 8)], the first lowest."""
    return as_bytes(packed)[:, : (columns + 1) // 2].contiguous()


def int8_values(packed: Tensor, columns: int) -> Tensor:
    """Returns values [N, K] int8 of codes 0 to 255, which stand for themselves minus 128, in int32s."""
    return (as_bytes(packed)[:, :columns] ^ 0x80).view(torch.int8)


def widened_int2_values(packed: Tensor, columns: int) -> Tensor:
    """Returns int4 values [N, ceil(K / 2)] of codes 0 to 3, which stand for themselves minus 2, in int32s."""
    codes = as_bytes(packed)
    halves = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(1)  # two codes each
    # Code c becomes c - 2 + 8.
    values = ((halves & 3) | (halves & 12) << 2) + 0x66
    return values[:, : (columns + 1) // 2].contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """Returns values [N, ceil(K / 2)] uint8 of codes [N, K] uint8 from 0 to 15, which stand for themselves minus 8."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_int4(values: Tensor, columns: int) -> Tensor:
    """Returns the codes [N, K] uint8 of values [N, ceil(K / 2)]."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(1)[:, :columns]


def unpack_columns(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Returns the codes [N, K] uint8 of `bits` (2, 4, 8) each in int32s [N, ceil(K * bits / 32)], the first lowest."""
    codes = as_bytes(packed)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes[..., None] >> shifts & (2**bits - 1)).flatten(1)[:, :columns]


def reorder(values: Tensor, order: Tensor, *, is_int4: bool) -> Tensor:
    """Returns the values with their columns in `order` [K]."""
    if not is_int4:
        return values.index_select(1, order)
    return pack_int4(unpack_int4(values, order.shape[0]).index_select(1, order))
