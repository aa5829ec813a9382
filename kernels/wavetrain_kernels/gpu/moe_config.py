# SPDX-License-Identifier: Apache-2.0
"""How the kernels of a mixture of experts are launched: by tokens per expert, or as it was measured.

Every border between two configurations is at a power of two of pairs. So from one border to the next numbers at least
double, and warm-up, which doubles the tokens of its steps, meets every combination.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from wavetrain_kernels.gpu.launch import DeviceTraits, cdiv, device_traits, next_power_of_2
from wavetrain_kernels.gpu.tuning import tuned

# P = pairs of a token and one of its experts, E = experts.

# Elements of the matrix (pairs of a chunk, experts) that one program of the sort has in registers.
_SORT_ELEMENTS = 8192
_ROUTE_ELEMENTS = 1024
MOST_ROWS = 128  # of a tile


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """A grouped product: its tile, and how many row tiles share a stretch of weights before the next one's turn."""

    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


# The first product of many rows where there are no warp-group instructions.
BEFORE_HOPPER = ProductConfig(block_n=64, block_k=64, group_m=8, num_warps=8, num_stages=3)


def rows_per_tile(num_pairs: int, num_experts: int, device: torch.device | None = None) -> int:
    """Returns BLOCK_M of both products: a usual expert's rows shall fit into one tile, and not fill it with nothing.

    Tuned under `moe_rows`, by experts and pairs per expert, both rounded up to powers of two.
    """
    num_experts = next_power_of_2(num_experts)
    pairs_per_expert = cdiv(num_pairs, num_experts)
    found = tuned("moe_rows", (num_experts, next_power_of_2(pairs_per_expert)), device)
    if found is not None:
        return found["block_m"]
    for block_m, most in ((16, 8), (32, 16), (64, 64)):
        if pairs_per_expert <= most:
            return block_m
    return MOST_ROWS


def gate_up_config(block_m: int, hidden: int, units: int, device: torch.device | None = None) -> ProductConfig:
    """Returns how the first product is launched. A tile has block_n gates and as many ups."""
    found = tuned("moe_gate_up", (block_m, hidden, units), device)
    if found is not None:
        return ProductConfig(**found)
    if block_m <= 32:
        # Bound by reading weights: many programs, each with tens of KiB under way.
        return ProductConfig(block_n=32, block_k=128, group_m=1, num_warps=4, num_stages=4)
    if block_m == 64:
        return ProductConfig(block_n=64, block_k=64, group_m=1, num_warps=4, num_stages=4)
    if device is not None and device_traits(device).capability[0] not in (9, 10):
        # Operands pass through registers there: the sums of two tiles of 128 columns would not fit beside them.
        return BEFORE_HOPPER
    return ProductConfig(block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=3)


def down_config(block_m: int, hidden: int, units: int, device: torch.device | None = None) -> ProductConfig:
    """Returns how the second product is launched."""
    found = tuned("moe_down", (block_m, hidden, units), device)
    if found is not None:
        return ProductConfig(**found)
    if block_m <= 32:
        return ProductConfig(block_n=64, block_k=128, group_m=1, num_warps=4, num_stages=4)
    if block_m == 64:
        return ProductConfig(block_n=128, block_k=64, group_m=1, num_warps=4, num_stages=4)
    return ProductConfig(block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=4)


@dataclass(frozen=True, slots=True)
class RoundedConfig:
    """A grouped product of 8-bit rows: what `ProductConfig` says, where the inputs of a step are fixed."""

    block_n: int
    group_m: int
    num_warps: int
    num_stages: int


def rounded_config(block_m: int, device: DeviceTraits, measured: dict[str, Any] | None = None) -> RoundedConfig:
    """Returns how 8-bit rows are multiplied; what was measured replaces what is reckoned here."""
    block_n, num_warps = 128, 8 if block_m > 64 else 4
    stage_bytes = 128 * (block_m + block_n)
    num_stages = max(2, min(4, device.shared_bytes * 7 // 8 // stage_bytes))
    return replace(RoundedConfig(block_n, 8 if block_m > 64 else 1, num_warps, num_stages), **(measured or {}))


def sort_chunk(num_pairs: int, num_experts: int) -> int:
    """Returns how many pairs one program of the sort takes; fewer where one program with fewer has them all."""
    most = max(16, min(1024, _SORT_ELEMENTS // next_power_of_2(num_experts)))
    return max(16, most // 4) if num_pairs <= most // 4 else most


def route_rows(num_experts: int) -> int:
    """Returns how many tokens one program of the routing takes."""
    return max(1, min(32, _ROUTE_ELEMENTS // next_power_of_2(num_experts)))


def most_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Returns how many tiles there can be, however pairs are spread over experts: what a static grid must have."""
    return min(num_pairs, (num_pairs + (block_m - 1) * min(num_pairs, num_experts)) // block_m)
