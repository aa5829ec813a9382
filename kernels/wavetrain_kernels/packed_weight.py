# SPDX-License-Identifier: Apache-2.0
"""A linear layer's weight in the layout that the kernels of its device read fastest. Made once at load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedWeight:
    """What `ops.pack_weight` makes of a weight [out_features, in_features].

    Attributes:
        data: the values, in a layout that only the kernel set that made it knows.
        dtype: of the weight, and of the inputs it multiplies.
        is_gated: the first half of the outputs are gates of the second half: for `ops.gated_linear`, and only for it.
    """

    data: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype
    is_gated: bool
