# SPDX-License-Identifier: Apache-2.0
"""A linear layer's weight in the layout that the kernels of its device read fastest. Made once at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wavetrain_kernels.quantized_weight import QuantizationScheme


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedWeight:
    """What `ops.pack_weight` and `ops.pack_quantized` make of a weight [out_features, in_features].

    Attributes:
        data: the values, in a form that only the kernel set that made it knows; a tensor where scheme is None.
        dtype: of the inputs it multiplies.
        is_gated: the first half of the outputs are gates of the second half: for `ops.gated_linear`, and only for it.
        scheme: how it is quantized; None: it is not, or these kernels hold it as if it never was.
    """

    data: Any
    out_features: int
    in_features: int
    dtype: torch.dtype
    is_gated: bool
    scheme: QuantizationScheme | None = None
