# SPDX-License-Identifier: Apache-2.0
"""How prefill attention is launched: a pure function of the model's sizes and the device.

What decides on Hopper, by count (no GPU was at hand when this was written; scripts/tune_kernels.py replaces it):
    - L2. A tile of BLOCK_M rows reads every key and value for 4 * BLOCK_M * D operations on 4 * D bytes. 128 rows need
      about 5 TB/s from L2 at 600 TFLOP/s, which is what it has; 64 rows would need twice that.
    - Registers. Two warp groups of 64 rows each: sums take D / 2 registers a thread, scores and weights of BLOCK_N
      keys about as much again. At 128 keys and D = 128 they no longer fit; at 64 they do, with the query beside them.
    - Shared memory. A product of 64 keys reads as many bytes of query as of key, and the ports would be the limit; so
      the query stays in registers where they suffice. Three stages: Triton starts the copies of a stage at the end of
      an iteration, so that with two it would wait for them at once.
    - A quantized cache. Widening codes takes registers, so the query goes to shared memory, where half as many bytes of
      keys leave it room, and heads of 64 get tiles of 64 keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from wavetrain_kernels.gpu.launch import DeviceTraits, next_power_of_2

# Rows that a packed tile may leave unused, as a share: 128 rows are 18 tokens of 7 heads and 2 rows of nothing.
_MAX_UNUSED = 0.125
# What a kernel has in shared memory besides the query and the stages: scratch of reductions.
_OTHER_SHARED_BYTES = 1024


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """All that a configuration depends on besides the device.

    Attributes:
        element_bytes: of the query, and of a cache that is not quantized.
        is_quantized: the cache has elements of one byte.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    element_bytes: int
    is_quantized: bool = False

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def cache_bytes(self) -> int:
        """Of an element of the cache."""
        return 1 if self.is_quantized else self.element_bytes

    @property
    def tuning_key(self) -> tuple[int, int, int]:
        """What a measured configuration goes by."""
        return self.head_dim, self.group, self.cache_bytes


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """A launch.

    Attributes:
        pack: query heads of a tile; a divisor of the group.
        block_m: rows (token, head) of a tile of queries; a power of two.
        block_n: keys of an iteration; a multiple of the block size.
        query_in_registers: rather than in shared memory, where the matrix units take either.
        is_skewed: the values' product of a tile runs beside the softmax of the next; for asynchronous matrix units.
    """

    pack: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    query_in_registers: bool
    is_skewed: bool

    @property
    def tile_tokens(self) -> int:
        """Consecutive tokens of a tile."""
        return self.block_m // self.pack


def prefill_config(shape: PrefillShape, device: DeviceTraits, tuned: Mapping[str, int] | None = None) -> PrefillConfig:
    """Chooses the launch. It does not depend on the step, so that a model needs one variant for each kind of layer.

    Args:
        tuned: measured values of fields that replace the heuristics'.
    """
    config = dataclasses.replace(_heuristic(shape, device), **(tuned or {}))
    # What was measured may have been so with smaller blocks: a tile of keys is whole blocks.
    config = dataclasses.replace(config, block_n=max(config.block_n, shape.block_size))
    return _fitted(config, shape, device)


def can_attend(shape: PrefillShape, device: DeviceTraits) -> bool:
    """Whether there is a launch for blocks of this size: a power of two of tokens, and no more than a tile has keys."""
    is_power_of_2 = shape.block_size == next_power_of_2(shape.block_size)
    return is_power_of_2 and shared_bytes(prefill_config(shape, device), shape) <= device.shared_bytes


def _heuristic(shape: PrefillShape, device: DeviceTraits) -> PrefillConfig:
    # Ampere, Ada and small Blackwell chips multiply in step with the program: there is nothing to overlap.
    is_asynchronous = device.capability[0] in (9, 10)
    block_m, block_n, num_warps, num_stages = 128, 64, 8, 3
    has_registers = shape.element_bytes == 2 and not shape.is_quantized
    block_d = next_power_of_2(shape.head_dim)
    if shape.element_bytes > 2:  # float32 is for tests: no matrix unit multiplies it exactly
        block_m, block_n, num_warps, num_stages = 64, 32, 8, 2
    elif block_d > 128:
        block_m, block_n = (128 if is_asynchronous else 64), 32
    elif is_asynchronous and block_d <= 64 and not shape.is_quantized:
        block_n = 128
    elif not is_asynchronous and block_d > 64:
        block_n = 32
    return PrefillConfig(
        pack=_pack(shape.group, block_m),
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        query_in_registers=is_asynchronous and has_registers and block_d <= 128,
        is_skewed=is_asynchronous,
    )


def _pack(group: int, block_m: int) -> int:
    """The most heads, of a group's divisors, that a tile holds without leaving many of its rows unused."""
    divisors = (pack for pack in range(min(group, block_m), 0, -1) if group % pack == 0)
    return next(pack for pack in divisors if block_m % pack <= block_m * _MAX_UNUSED)


def _fitted(config: PrefillConfig, shape: PrefillShape, device: DeviceTraits) -> PrefillConfig:
    """Lessens what takes shared memory until the device has it: the third stage, then keys, rows, the second stage."""
    while shared_bytes(config, shape) > device.shared_bytes:
        if config.num_stages > 2:
            config = dataclasses.replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > max(16, shape.block_size):
            config = dataclasses.replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16:
            block_m = config.block_m // 2
            config = dataclasses.replace(config, block_m=block_m, pack=_pack(shape.group, block_m), num_warps=4)
        elif config.num_stages > 1:
            config = dataclasses.replace(config, num_stages=1)
        else:
            break  # the compiler says by how much
    return config


def shared_bytes(config: PrefillConfig, shape: PrefillShape) -> int:
    """Returns about how much shared memory a program takes; exact for what we ship on Hopper."""
    block_d = next_power_of_2(shape.head_dim)
    rows = 0 if config.query_in_registers else config.block_m
    if shape.is_quantized:  # what codes are widened to lies beside them
        rows += 2 * config.block_n
    staged_bytes = 2 * config.num_stages * config.block_n * block_d * shape.cache_bytes
    return rows * block_d * shape.element_bytes + staged_bytes + _OTHER_SHARED_BYTES
