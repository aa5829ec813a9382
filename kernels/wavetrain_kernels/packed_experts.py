# SPDX-License-Identifier: Apache-2.0
"""One projection of all experts of a layer, in the layout that the kernels of its device read fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavetrain_kernels.quantized_weight import QuantizationScheme


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedExperts:
    """What `ops.empty_experts` and `ops.empty_quantized_experts` make, and `ops.pack_expert` fills, expert by expert.

    Attributes:
        data: the values, in a form that only the kernel set that made it knows; a tensor where scheme is None.
        device: where it is.
        dtype: of the inputs that the weights multiply; of the weights too, where they are not quantized.
        is_gated: the first half of an expert's outputs are gates of the second half.
        scheme: how the weights are quantized; None: they are not, or these kernels hold them as if they never were.
        codebook: [16] float32, of all experts, where the scheme has one.
    """

    data: Any
    device: torch.device
    num_experts: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    is_gated: bool
    scheme: QuantizationScheme | None = None
    codebook: Tensor | None = None
