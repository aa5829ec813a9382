# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (Xiao et al. 2022, equation 4): the range of inputs is levelled, at the expense of the weights'.

    s[k] = max |x[k]|^strength / max |W[:, k]|^(1 - strength)

An input rounded by token shares one scale among all its numbers, and a few of them are often far larger than the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.quantizer.folding import bounded, tie
from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.layer_structure import SharedInput


def smoothing_scales(
    weights: dict[str, Tensor], shared: SharedInput, moments: InputMoments, strength: float
) -> Tensor | None:
    """Returns the scales [R] of an input's source; None where it cannot be scaled, or was never seen."""
    source = shared.source
    if source is None or moments.count == 0:
        return None
    largest = torch.stack([weights[f"{name}.weight"].abs().amax(0) for name in shared.matrices]).amax(0)
    inputs, matrices = tie(moments.largest, source), tie(largest, source)
    return bounded(inputs.pow(strength) / matrices.clamp(min=1e-5).pow(1 - strength))
