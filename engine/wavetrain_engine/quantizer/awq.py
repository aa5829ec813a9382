# SPDX-License-Identifier: Apache-2.0
"""AWQ (Lin et al. 2023, section 3.2): inputs that are large on average are scaled down, and their weights up.

A weight that is multiplied before it is rounded, and divided by as much afterwards, loses less to rounding; others of
its group lose more if the group's range grows. How far to go, from not at all to in proportion to the inputs, is
searched for by the error of the outputs. What AWQ clips, the grid's search does: `rounding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.quantizer.folding import bounded, spread, tie
from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.layer_structure import SharedInput
from wavetrain_engine.quantizer.rounding import Grid, round_weight

_NUM_STEPS = 20  # of the exponent, from 0 to 1: the paper's
_MAX_ROWS = 4096  # of all matrices together, evenly spread, that a trial rounds: the scales are the same for all


def search_scales(weights: dict[str, Tensor], shared: SharedInput, grid: Grid, moments: InputMoments) -> Tensor | None:
    """Returns the scales [R] of an input's source that let its matrices lose least; None: it is best left alone."""
    source = shared.source
    if source is None or moments.count == 0:
        return None
    sizes = tie(moments.sizes, source)
    stride = -(-sum(rows for rows, _ in shared.matrices.values()) // _MAX_ROWS)
    samples = [weights[f"{name}.weight"][::stride] for name in shared.matrices]
    best_loss, best = torch.inf, None
    for step in range(_NUM_STEPS + 1):
        scales = bounded(sizes.pow(step / _NUM_STEPS))
        factors = spread(scales, source)
        loss = sum(_loss(sample, grid, factors, moments) for sample in samples)
        if loss < best_loss:
            best_loss, best = loss, scales if step else None
    return best


def _loss(weight: Tensor, grid: Grid, factors: Tensor, moments: InputMoments) -> float:
    rounded = round_weight(weight * factors, grid).dequantize() / factors
    return moments.loss(rounded - weight).sum().item()
