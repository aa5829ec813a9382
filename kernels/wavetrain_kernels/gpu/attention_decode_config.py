# SPDX-License-Identifier: Apache-2.0
"""How decode attention is launched: a pure function of the model's sizes, the padded batch and the device.

What it aims at is bytes on their way. At 4.8 TB/s and about a microsecond of latency, an H200's memory is busy only
while each of its multiprocessors waits for 36 KiB or more; the loads of a program stop for about two microseconds when
it goes from one row to the next. So each multiprocessor gets two programs, either of which keeps enough on its way
alone, in all the shared memory that two can have. More programs would be more parts to merge, and fewer registers. Wide
tiles of queries (drafts of models with large groups) need the registers of both, and get one program of eight warps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from wavetrain_kernels.gpu.launch import KIB, DeviceTraits, next_power_of_2

# A row with more queries than this belongs to the prefill kernel.
MAX_DECODE_QUERY_LEN = 8

# As many as a thread can have, which fits two programs of four warps or one of eight. Not told so, the assembler spills
# some to make room for a third program, which shared memory has no room for.
MAX_REGISTERS = 255

# Elements of a tile of keys: 16 KiB in 16 bits. Smaller ones pay the barriers of an iteration more often.
_TILE_ELEMENTS = 8192
_MIN_TILE_N, _MAX_TILE_N = 16, 128
# Queries in a tile from which on two programs have too few registers, and above which a tile of keys is halved.
_WIDE_TILE = 64
# One stage is computed on while the others are on their way: with three, that is never fewer than one.
_MIN_STAGES, _MAX_STAGES = 3, 4
# What the driver keeps of shared memory for each block, and what a program has besides its keys and values.
_RESERVED_BYTES = KIB
_OTHER_SHARED_BYTES = 6 * KIB
# What 8-bit codes are widened to, to be multiplied.
_QUANTIZED_OPERAND_BYTES = 2
# Elements that a program merges at a time: 32 and 64 registers in each of 128 threads.
_MERGE_ELEMENTS_INSIDE, _MERGE_ELEMENTS = 4096, 8192
# Parts and rows up to which the last program of a row merges it, rather than a kernel of its own.
_MAX_PARTS_INSIDE = 72
_MAX_ROWS_INSIDE = 16


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """All that a configuration depends on besides the device: nothing that changes between replays of a graph.

    Attributes:
        num_rows: rows of the batch, padding included.
        max_query_len: most queries of a row that decode attention takes.
        element_bytes: of the cache; 1 where it is quantized.
        scales_values: values are scaled before they are multiplied, as of a quantized cache in float16. It takes
            registers, which a tile of half the keys leaves.
    """

    num_rows: int
    max_query_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    scales_values: bool = False

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tuning_key(self) -> tuple[int, int, int]:
        """What a measured configuration goes by: the sizes of the tiles' two products."""
        return self.head_dim, _block_m(self), self.element_bytes


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """A launch.

    Attributes:
        num_programs: of each key-value head.
        block_m: rows (token, head of the group) of a tile of queries.
        block_d: head_dim, up to a power of two.
        block_b: rows of the batch, up to one of few powers of two: each is a compiled variant.
        tile_n: keys of an iteration.
        min_tiles: a program starts only where there are as many tiles for it.
        merges: the last program of a row merges its parts; otherwise the second kernel does.
        merge_m, merge_p: rows and parts merged at a time.
    """

    num_programs: int
    block_m: int
    block_d: int
    block_b: int
    tile_n: int
    min_tiles: int
    merges: bool
    merge_m: int
    merge_p: int
    num_warps: int
    num_stages: int


def decode_config(shape: DecodeShape, device: DeviceTraits, tuned: Mapping[str, int] | None = None) -> DecodeConfig:
    """Chooses the launch.

    Args:
        tuned: measured values of fields, and of `programs_per_sm`, that replace the heuristics'.
    """
    measured = dict(tuned or {})
    # The summed dimension of a product has 16 elements at least, of which the interpreter knows nothing.
    block_m, block_d = _block_m(shape), max(16, next_power_of_2(shape.head_dim))
    is_wide = block_m >= _WIDE_TILE
    num_warps = measured.get("num_warps", 8 if is_wide else 4)
    programs_per_sm = measured.pop("programs_per_sm", 1 if is_wide else 2)
    num_programs = max(1, device.num_sms * programs_per_sm // shape.num_kv_heads)
    tile_n = _TILE_ELEMENTS // block_d // (2 if block_m > _WIDE_TILE or shape.scales_values else 1)
    tile_n = max(_MIN_TILE_N, min(_MAX_TILE_N, tile_n))
    stages_of = functools.partial(_num_stages, device, programs_per_sm, block_m, block_d, shape.element_bytes)
    while tile_n > _MIN_TILE_N and stages_of(tile_n) < _MIN_STAGES:
        tile_n //= 2
    tile_n = measured.get("tile_n", tile_n)
    merges = num_programs <= _MAX_PARTS_INSIDE and block_m <= _MAX_ROWS_INSIDE
    merge_m, merge_elements = (4, _MERGE_ELEMENTS_INSIDE) if merges else (1, _MERGE_ELEMENTS)
    config = DecodeConfig(
        num_programs=num_programs,
        block_m=block_m,
        block_d=block_d,
        block_b=_block_b(shape.num_rows, num_warps),
        tile_n=tile_n,
        min_tiles=2,
        merges=merges,
        merge_m=merge_m,
        merge_p=max(1, merge_elements // (merge_m * block_d)),
        num_warps=num_warps,
        num_stages=stages_of(tile_n),
    )
    return dataclasses.replace(config, **measured)


def _block_m(shape: DecodeShape) -> int:
    """The tensor cores' products have 16 rows at least."""
    return max(16, next_power_of_2(shape.max_query_len * shape.group))


def _block_b(num_rows: int, num_warps: int) -> int:
    """Each thread has one row at least: a scan over fewer elements than threads would do them twice."""
    block_b = 32 * num_warps
    while block_b < num_rows:
        block_b *= 4
    return block_b


def _num_stages(
    device: DeviceTraits, programs_per_sm: int, block_m: int, block_d: int, element_bytes: int, tile_n: int
) -> int:
    """As many as fit. A stage is a tile of keys and one of values; Triton keeps one fewer of them than stages."""
    available = (device.shared_bytes + _RESERVED_BYTES) // programs_per_sm - _RESERVED_BYTES
    stage_bytes = 2 * tile_n * block_d * element_bytes
    operand_bytes = max(element_bytes, _QUANTIZED_OPERAND_BYTES)
    other_bytes = block_m * (block_d + tile_n) * operand_bytes
    if element_bytes < operand_bytes:  # codes go through shared memory once more when they are widened
        other_bytes += tile_n * block_d * operand_bytes
    fitting = (available - max(_OTHER_SHARED_BYTES, other_bytes)) // stage_bytes
    return max(2, min(_MAX_STAGES, fitting + 1))
