# SPDX-License-Identifier: Apache-2.0
"""Weights rounded to few bits: the grid of scales and zero points, found by search, and the nearest point of it.

    weight[n, k] is nearly (values[n, k] - zero_points[n, g]) * scales[n, g],   g = k // group_size

A scale that the largest weight just fits into wastes steps on it, so smaller ones are tried: of the ranges from all of
it down to two fifths, each group takes the one that loses least. What counts as loss is the sum of squared errors, or,
where the inputs' second moments are known, the expected squared error of what the group adds to an output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wavetrain_engine.quantizer.recipe import BLOCK_SIZE, PER_CHANNEL, Recipe

# N = outputs, K = inputs, G = groups, S = inputs of a group.

_LARGEST_FP8 = 448.0
_SHRINKS = tuple(1.0 - 0.025 * step for step in range(25))
_ROWS_AT_ONCE = 2**22  # elements of a weight that are tried at once: what is in memory several times


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What weights are rounded to.

    Attributes:
        group_size: inputs that share a scale; PER_CHANNEL: all.
        block_rows: outputs that share one: more than one in block-scaled fp8 only.
        scale_dtype: of the checkpoint, in which scales are stored: they are rounded to it first, then weights by them.
    """

    num_bits: int
    is_float: bool
    is_symmetric: bool
    group_size: int
    block_rows: int
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, recipe: Recipe, group_size: int, scale_dtype: torch.dtype) -> Grid:
        """The grid that a recipe asks for."""
        scheme = recipe.weight_scheme
        return cls(
            num_bits=scheme.num_bits,
            is_float=scheme.is_float,
            is_symmetric=recipe.is_symmetric,
            group_size=group_size,
            block_rows=BLOCK_SIZE if scheme.is_blocked else 1,
            scale_dtype=scale_dtype,
        )

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return -(1 << (self.num_bits - 1))

    @property
    def highest(self) -> int:
        """The highest integer."""
        return (1 << (self.num_bits - 1)) - 1

    def width(self, in_features: int) -> int:
        """Inputs of a group, of a weight with this many."""
        return in_features if self.group_size == PER_CHANNEL else min(self.group_size, in_features)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoundedWeight:
    """A weight on its grid.

    Attributes:
        values: [N, K] int8, or float8_e4m3fn.
        scales: [ceil(N / block_rows), G] of the grid's scale_dtype.
        zero_points: as scales, int8; None: all are zero.
    """

    grid: Grid
    values: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def dequantize(self) -> Tensor:
        """Returns the weight [N, K] in float32."""
        num_rows, width = self.values.shape[0], self.grid.width(self.values.shape[1])
        values = self.values.float()
        if self.zero_points is not None:
            values = values - _spread(self.zero_points.float(), self.grid, num_rows, width, values.shape[1])
        return values * _spread(self.scales.float(), self.grid, num_rows, width, values.shape[1])


def find_grid(weight: Tensor, grid: Grid, moments: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Searches the scales and zero points of a weight [N, K], in float32.

    Args:
        moments: [K, K], of the inputs: only the blocks of each group on the diagonal count; None: all inputs alike.

    Returns:
        scales [N, G] as rounded to the grid's dtype, in float32, and zero points [N, G], likewise; no zero points where
        the grid is symmetric.
    """
    width = grid.width(weight.shape[1])
    blocks = None if moments is None else _diagonal_blocks(moments, width)
    rows = max(1, _ROWS_AT_ONCE // weight.shape[1])
    found = [_search(piece.unflatten(1, (-1, width)), grid, blocks) for piece in weight.split(rows)]
    scales = torch.cat([scales for scales, _ in found])
    return scales, None if grid.is_symmetric else torch.cat([zeros for _, zeros in found])


def round_weight(weight: Tensor, grid: Grid, moments: Tensor | None = None) -> RoundedWeight:
    """Rounds each element of a weight [N, K] to the nearest point of a grid that `find_grid` finds for it."""
    weight = weight.float()
    if grid.is_float:
        return _round_to_fp8(weight, grid)
    scales, zero_points = find_grid(weight, grid, moments)
    return round_to(weight, grid, scales, zero_points)


def round_to(weight: Tensor, grid: Grid, scales: Tensor, zero_points: Tensor | None) -> RoundedWeight:
    """Rounds each element of a weight [N, K] to the nearest point of this grid."""
    num_rows, num_inputs = weight.shape
    width = grid.width(num_inputs)
    steps = weight / _spread(scales, grid, num_rows, width, num_inputs)
    if zero_points is not None:
        steps = steps + _spread(zero_points, grid, num_rows, width, num_inputs)
    return finish(steps.round().clamp(grid.lowest, grid.highest), grid, scales, zero_points)


def finish(steps: Tensor, grid: Grid, scales: Tensor, zero_points: Tensor | None) -> RoundedWeight:
    """Puts integers [N, K], held as float32, and their grid into the form they are stored in."""
    return RoundedWeight(
        grid=grid,
        values=steps.to(torch.int8),
        scales=scales.to(grid.scale_dtype),
        zero_points=None if zero_points is None else zero_points.to(torch.int8),
    )


def choose_rows(is_first: Tensor, first: RoundedWeight, second: RoundedWeight) -> RoundedWeight:
    """Returns the rows of `first` where is_first [N] says so, and those of `second` elsewhere; grids are equal."""
    return replace(first, values=torch.where(is_first[:, None], first.values, second.values))


def _round_to_fp8(weight: Tensor, grid: Grid) -> RoundedWeight:
    """e4m3 has steps in proportion to a number's size: shrinking the range would gain nothing."""
    num_rows, num_inputs = weight.shape
    width = grid.width(num_inputs)
    padded = torch.nn.functional.pad(weight, (0, -num_inputs % width, 0, -num_rows % grid.block_rows))
    largest = padded.unflatten(1, (-1, width)).unflatten(0, (-1, grid.block_rows)).abs().amax((1, 3))
    scales = _storable(largest / _LARGEST_FP8, grid)
    steps = weight / _spread(scales, grid, num_rows, width, num_inputs)
    return RoundedWeight(
        grid=grid,
        values=steps.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn),
        scales=scales.to(grid.scale_dtype),
        zero_points=None,
    )


def _search(groups: Tensor, grid: Grid, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tries all ranges of groups [N, G, S] and returns the best scales and zero points [N, G]."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best_loss = torch.full_like(low, torch.inf)
    best_scales, best_zeros = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS[: 5 if grid.num_bits == 8 else None]:
        scales, zeros = _range_to_grid(low * shrink, high * shrink, grid)
        steps = groups.div(scales[..., None]).add_(zeros[..., None]).round_().clamp_(grid.lowest, grid.highest)
        errors = steps.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups)
        if blocks is None:
            loss = errors.square_().sum(-1)
        else:
            products = torch.bmm(errors.transpose(0, 1), blocks)  # [G, N, S]
            loss = (products * errors.transpose(0, 1)).sum(-1).t()
        is_better = loss < best_loss
        best_loss = torch.where(is_better, loss, best_loss)
        best_scales, best_zeros = torch.where(is_better, scales, best_scales), torch.where(is_better, zeros, best_zeros)
    return best_scales, best_zeros


def _range_to_grid(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    num_steps = (1 << grid.num_bits) - 1
    if grid.is_symmetric:
        return _storable(torch.maximum(-low, high) / (num_steps / 2), grid), torch.zeros_like(low)
    scales = _storable((high - low) / num_steps, grid)
    return scales, (grid.lowest - low / scales).round().clamp(grid.lowest, grid.highest)


def _storable(scales: Tensor, grid: Grid) -> Tensor:
    """Rounds scales to the dtype they are stored in; a group of zeros, or nearly, gets the smallest sound scale."""
    smallest = torch.finfo(grid.scale_dtype).tiny
    stored = scales.clamp(min=smallest, max=torch.finfo(grid.scale_dtype).max).to(grid.scale_dtype).float()
    return torch.where(scales > 0, stored, torch.ones_like(stored))


def _diagonal_blocks(moments: Tensor, width: int) -> Tensor:
    """Returns the blocks [G, S, S] on the diagonal of [K, K]."""
    groups = moments.unflatten(0, (-1, width)).unflatten(2, (-1, width))  # [G, S, G, S]
    return groups.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _spread(numbers: Tensor, grid: Grid, num_rows: int, width: int, num_inputs: int) -> Tensor:
    """A number of each group, and block of rows → of each element [N, K]."""
    rows = numbers if grid.block_rows == 1 else numbers.repeat_interleave(grid.block_rows, 0)[:num_rows]
    return rows.repeat_interleave(width, 1)[:, :num_inputs]
