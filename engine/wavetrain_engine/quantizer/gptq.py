# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2022, algorithm 1): rounds one input after the other, and lets the later ones make up for it.

With the Cholesky factor U of the inverse moments (M + damping)^-1 = U^T U, rounding input k by an error e, in every row
at once, is best made up for by taking e / U[k, k] * U[k, j] off the weights of the later inputs j. Blocks of inputs are
done by themselves, and the rest of the matrix is brought up to date after each (section 3.3, lazy batch updates).

Act-order goes through the inputs by falling moments, so that those that matter most are rounded while there are still
many others to make up for them. Groups stay as they are in the checkpoint (static groups): scales are found before
anything is rounded, and nothing needs to be reordered when the model is run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.rounding import Grid, RoundedWeight, choose_rows, find_grid, finish, round_to

# N = outputs, K = inputs, B = inputs of a block.

_DAMPING = 0.01  # of the moments' mean, added to each: the paper's
_MAX_DAMPING_STEPS = 6  # each ten times the last
_BLOCK = 128


def gptq(weight: Tensor, grid: Grid, moments: InputMoments, *, has_act_order: bool) -> RoundedWeight:
    """Returns a weight [N, K] rounded so that its outputs, for inputs of these moments, change little.

    No row's expected squared error is larger than that of rounding each element to the nearest point of the same grid:
    where making up was in vain, which the greedy order cannot rule out, the row is rounded that way.
    """
    weight = weight.float()
    scales, zero_points = find_grid(weight, grid, moments.second)
    nearest = round_to(weight, grid, scales, zero_points)
    diagonal = moments.second.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if has_act_order else torch.arange(weight.shape[1])
    factor = _inverse_factor(moments.second[order][:, order])
    if factor is None:
        return nearest
    group = order // grid.width(weight.shape[1])
    steps = torch.empty_like(weight)
    steps[:, order] = _round_in_order(
        weight[:, order],
        factor,
        scales[:, group],
        None if zero_points is None else zero_points[:, group],
        grid,
    )
    made_up = finish(steps, grid, scales, zero_points)
    is_better = moments.loss(made_up.dequantize() - weight) <= moments.loss(nearest.dequantize() - weight)
    return choose_rows(is_better, made_up, nearest)


def _inverse_factor(moments: Tensor) -> Tensor | None:
    """Returns the upper factor U [K, K] of the inverse of moments [K, K]; None where there is none, such as of NaNs.

    Inputs that were always zero get moments of their own, so that they are rounded to the nearest, and nothing else is
    changed for them.
    """
    matrix = moments.clone()
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return None
    diagonal[diagonal == 0] = mean
    damping = _DAMPING * mean
    for _ in range(_MAX_DAMPING_STEPS):
        diagonal += damping
        lower, has_failed = torch.linalg.cholesky_ex(matrix)
        if not has_failed:
            inverse = torch.cholesky_inverse(lower)
            upper, has_failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not has_failed:
                return upper
        damping = 10 * damping
    return None


def _round_in_order(weight: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> Tensor:
    """Rounds a weight [N, K], whose memory it takes, input by input; scales and zero points are given for each element.

    Returns:
        The integers [N, K], in float32.
    """
    # Columns are read and written one at a time: as rows of the transposed they lie together.
    left = weight.t().contiguous()
    scales = scales.t().contiguous()
    zeros = torch.zeros_like(scales) if zero_points is None else zero_points.t().contiguous()
    steps = torch.empty_like(left)
    for start in range(0, left.shape[0], _BLOCK):
        stop = min(start + _BLOCK, left.shape[0])
        block, local = left[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for index in range(stop - start):
            row, at = block[index], start + index
            torch.addcdiv(zeros[at], row, scales[at], out=steps[at])
            steps[at].round_().clamp_(grid.lowest, grid.highest)
            rounded = (steps[at] - zeros[at]).mul_(scales[at])
            errors[index] = (row - rounded).div_(local[index, index])
            block[index + 1 :].addr_(local[index, index + 1 :], errors[index], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return steps.t()
