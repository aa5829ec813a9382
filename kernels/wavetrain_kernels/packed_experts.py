# SPDX-License-Identifier: Apache-2.0
"""One projection of all experts of a layer, in the layout that the kernels of its device read fastest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedExperts:
    """Memory that `ops.empty_experts` made, and `ops.pack_expert` fills, expert by expert.

    Attributes:
        data: the values, in a layout that only the kernel set that made it knows.
        dtype: of the weights, and of the inputs they multiply.
        is_gated: the first half of an expert's outputs are gates of the second half.
    """

    data: Tensor
    num_experts: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    is_gated: bool
