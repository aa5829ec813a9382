# SPDX-License-Identifier: Apache-2.0
"""Rows that a norm or a gate has rounded already for the projection behind it, in the form its kernels want."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedInputs:
    """What `ops.linear` takes in place of x, with the weight that it was made for and no other.

    Attributes:
        values: [T, K and padding] int8 or float8_e4m3fn, in the order of the packed weight.
        scales: [T, groups] float32.
        static_scale: [1] float32, the scale of every row; None: each row, or group, has the scale that it needs.
        in_features: K.
        dtype: of the rows before they were rounded, and of what is computed from them.
    """

    values: Tensor
    scales: Tensor
    static_scale: Tensor | None
    in_features: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """T."""
        return self.values.shape[0]
