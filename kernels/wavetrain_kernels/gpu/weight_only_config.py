# SPDX-License-Identifier: Apache-2.0
"""How products of rows with quantized weights are launched: by rows and sizes, or as it was measured.

Every border between two configurations is at a power of two of rows, so warm-up, which doubles the tokens of its steps,
meets them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from wavetrain_kernels.gpu.launch import KIB, DeviceTraits, cdiv, device_traits
from wavetrain_kernels.gpu.quantized_packing import QuantizedShape
from wavetrain_kernels.gpu.tuning import tuned

# T = rows, N = outputs, K = inputs, B = blocks of inputs.

# From so many rows on, the weight is widened once, for cuBLAS: the product takes several times as long as that by then.
DENSE_FROM = 1025
_ROW_TILES = (16, 32, 64, 128)
_ROOM = 8 * KIB  # of shared memory, for what the compiler adds to the pipeline's tiles


@dataclass(frozen=True, slots=True)
class WeightOnlyConfig:
    """A launch: tiles of `block_n` outputs by `block_t` rows, the inputs of each cut into `num_splits` parts.

    Attributes:
        is_fused: False: the weight is widened, and cuBLAS multiplies.
    """

    block_t: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int
    is_fused: bool = True


def row_tile(bucket: int, *, has_codebook: bool, device: DeviceTraits) -> int:
    """Returns how many rows a tile has: no more than registers hold the sums of, which on Hopper are most."""
    if has_codebook:
        return min(bucket, 32)
    return min(bucket, _ROW_TILES[-1] if device.capability[0] == 9 else 64)


def weight_only_config(num_rows: int, shape: QuantizedShape, device: torch.device) -> WeightOnlyConfig:
    """Returns the configuration, of a bucket of rows: up to 16, 32, 64, 128 and so on, doubling."""
    bucket = max(1 << (num_rows - 1).bit_length(), _ROW_TILES[0]) if num_rows else _ROW_TILES[0]
    key = (bucket, shape.out_features, shape.in_features, shape.bits)
    return chosen_config(bucket, shape, device_traits(device), tuned("weight_only", key, device))


def chosen_config(
    bucket: int, shape: QuantizedShape, device: DeviceTraits, measured: dict[str, Any] | None = None
) -> WeightOnlyConfig:
    """Returns the configuration for a bucket of rows on a device; what was measured replaces what is reckoned here."""
    block_t = row_tile(bucket, has_codebook=shape.has_codebook, device=device)
    # 64 rows of the weight are one side of a warp-group instruction; two of them share the rows of x that they read.
    # From 64 rows of x on the sums take twice the registers, so twice the threads share them.
    block_n, num_warps = 128, 4 if block_t <= 32 else 8
    if shape.has_codebook:  # the loads of the codebook fill registers
        block_n, num_warps = 64, 4
    stage_bytes = block_n * shape.block_k * shape.bits // 8 + 2 * shape.block_k * block_t
    # Of few rows, two programs share an SM: while one waits for its matrix instructions the other widens values.
    shared_bytes = device.shared_bytes // (2 if block_t <= 32 else 1) - _ROOM
    num_stages = max(2, min(4, shared_bytes // stage_bytes))
    tiles = cdiv(shape.out_features, block_n) * cdiv(bucket, block_t)
    config = WeightOnlyConfig(
        block_t=block_t,
        block_n=block_n,
        num_splits=_num_splits(tiles, shape.num_blocks, block_t, device),
        num_warps=num_warps,
        num_stages=num_stages,
        is_fused=bucket < DENSE_FROM,
    )
    return replace(config, **(measured or {}))


def _num_splits(tiles: int, num_blocks: int, block_t: int, device: DeviceTraits) -> int:
    """Returns how many programs share the inputs of a tile, so that all SMs read; each with two blocks or more."""
    slots = device.num_sms * (2 if block_t <= 32 else 1)
    wanted = max(1, slots // tiles)
    wanted = min(wanted, max(1, num_blocks // 2))
    # As many as are left once each has the same number of blocks: a program with a block more would be waited for.
    return cdiv(num_blocks, cdiv(num_blocks, wanted))
