# SPDX-License-Identifier: Apache-2.0
"""Whether what stands in front of a projection writes 8-bit rows for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.packed_weight import PackedWeight
from wavetrain_kernels.quantized_inputs import QuantizedInputKernels, QuantizedInputs


@dataclass(frozen=True, slots=True)
class NewInputs:
    """Rows that are to be filled, and what fills them."""

    rows: QuantizedInputs
    kernels: QuantizedInputKernels


def new_inputs(
    kernels: KernelSet, shape: Sequence[int], dtype: torch.dtype, weight: PackedWeight | None
) -> NewInputs | None:
    """Returns room for 8-bit rows [T, K] in place of rows of `dtype`; None where a weight takes those as they are.

    Raises:
        ShapeError: the weight is for rows of another length.
        DtypeError: it is for rows of another dtype.
    """
    if weight is None:
        return None
    if weight.in_features != shape[-1]:
        raise ShapeError(f"the weight behind these rows must take {shape[-1]} inputs, it takes {weight.in_features}")
    if weight.dtype != dtype:
        raise DtypeError(f"the weight behind these rows must take {dtype}, it takes {weight.dtype}")
    if weight.scheme is None or kernels.quantized_inputs is None or len(shape) != 2:
        return None
    rows = kernels.quantized_inputs.new(weight.data, shape[0])
    return None if rows is None else NewInputs(rows, kernels.quantized_inputs)
