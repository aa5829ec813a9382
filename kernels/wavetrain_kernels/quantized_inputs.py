# SPDX-License-Identifier: Apache-2.0
"""Rows that a norm or a gate has rounded already for the projection behind it, in the form its kernels want."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedInputs:
    """What `ops.linear` takes in place of x, with the weight that it was made for and no other.

    Attributes:
        packed: the data of that weight.
        values: [T, K and padding] int8 or float8_e4m3fn, in the order of the packed weight.
        scales: [T, groups] float32.
        static_scale: [1] float32, the scale of every row; None: each row, or group, has the scale that it needs.
        in_features: K.
        dtype: of the rows before they were rounded, and of what is computed from them.
    """

    packed: Any
    values: Tensor
    scales: Tensor
    static_scale: Tensor | None
    in_features: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """T."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.values.device


Rows = Tensor | QuantizedInputs
"""What a norm or a gate leaves, and a projection takes: [T, K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedInputKernels:
    """The operations of a kernel set that write or read 8-bit rows. Argument lists are positional, as its others.

    Attributes:
        new: (packed, num_rows) -> rows to be filled for a quantized weight; None where it takes them as they are
        rms_norm: (out, x, weight, eps, weight_offset)
        add_rms_norm: (out, residual_out, x, residual, weight, eps, weight_offset)
        linear: (out, x, packed, bias)
        gated_linear: (out, x, packed, bias, activation); either or both of `out` and x are 8-bit rows
    """

    new: Callable[[Any, int], QuantizedInputs | None]
    rms_norm: Callable[[QuantizedInputs, Tensor, Tensor, float, float], None]
    add_rms_norm: Callable[[QuantizedInputs, Tensor, Tensor, Tensor, Tensor, float, float], None]
    linear: Callable[[Tensor, QuantizedInputs, Any, Tensor | None], None]
    gated_linear: Callable[[Rows, Rows, Any, Tensor | None, str], None]
