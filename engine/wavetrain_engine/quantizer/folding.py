# SPDX-License-Identifier: Apache-2.0
"""Scales moved from an input into the matrices that read it: W x = (W s) (x / s), with 1 / s taken where x is made.

The model computes what it computed, nothing is added to it, and either side may have become easier to round. A norm's
weight is rounded to the checkpoint's dtype here, so the scale is taken from what it became: the product stays.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.layer_structure import SharedInput, Source

# K = inputs, R = numbers that the source makes: K, or K over the copies of each.

_RANGE = 1e4  # scales are kept within 1 / _RANGE and _RANGE: zeros would otherwise make them infinite


def tie(numbers: Tensor, source: Source) -> Tensor:
    """Sums of the inputs [K] → of what makes them [R]: the largest of the copies."""
    if source.num_copies == 1:
        return numbers
    return numbers.unflatten(0, (-1, source.num_copies, source.copy_size)).amax(1).flatten()


def spread(scales: Tensor, source: Source) -> Tensor:
    """Scales of what makes the inputs [R] → of the inputs [K]."""
    if source.num_copies == 1:
        return scales
    heads = scales.unflatten(0, (-1, 1, source.copy_size))
    return heads.expand(-1, source.num_copies, -1).flatten()


def bounded(scales: Tensor) -> Tensor:
    """Returns positive scales, around one, without what zeros and infinities would make of them."""
    sound = torch.nan_to_num(scales, nan=1.0, posinf=_RANGE, neginf=1.0).clamp(1 / _RANGE, _RANGE)
    middle = (sound.amax() * sound.amin()).sqrt()
    return (sound / middle).clamp(1 / _RANGE, _RANGE)


def fold(
    weights: dict[str, Tensor], shared: SharedInput, scales: Tensor, moments: Iterable[InputMoments], dtype: torch.dtype
) -> Tensor:
    """Divides the input by scales [R] at its source, and multiplies the matrices that read it.

    Args:
        weights: of the layer, by name in the checkpoint, in float32; changed.
        moments: of the input; changed.
        dtype: of the checkpoint.

    Returns:
        The scales [K] of the inputs, as they became.
    """
    source = shared.source
    assert source is not None, "an input that nothing makes cannot be scaled"
    if source.norm_offset is not None:
        name = f"{source.name}.weight"
        before = weights[name] + source.norm_offset
        weights[name] = (before / scales - source.norm_offset).to(dtype).float()
        after = weights[name] + source.norm_offset
        is_exact = (after != 0) & (before != 0)
        weights[name] = torch.where(is_exact, weights[name], before - source.norm_offset)
        scales = torch.where(is_exact, before / after, torch.ones_like(scales))
    else:
        weights[f"{source.name}.weight"] = weights[f"{source.name}.weight"] / scales[:, None]
        bias = f"{source.name}.bias"
        if bias in weights:
            weights[bias] = weights[bias] / scales
    factors = spread(scales, source)
    for name in (*shared.matrices, *shared.unquantized):
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * factors
    for item in moments:
        item.rescale(1 / factors)
    return factors
