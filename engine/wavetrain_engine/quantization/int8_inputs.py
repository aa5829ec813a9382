# SPDX-License-Identifier: Apache-2.0
"""Inputs of int8 for weights whose checkpoint leaves them as they are: w4a16 becomes w4a8, w8a16 becomes w8a8."""

from __future__ import annotations

from dataclasses import replace

from wavetrain_kernels.ops import QuantizedWeight

# Inputs that share a scale. A large one costs those beside it their digits, so they should be few; but each scale costs
# every sum a multiplication. See docs/decisions/0025.
_GROUP_SIZES = (128, 64, 32, 16)


def with_int8_inputs(weight: QuantizedWeight) -> QuantizedWeight:
    """Returns the weight with inputs rounded to int8; one that is not of integers, or rounds already, as it is.

    Each token has scales of its own, one for each group of the weight or of a part of such a group.
    """
    scheme = weight.scheme
    if scheme.inputs is not None or scheme.values == "fp8" or scheme.has_codebook:
        return weight
    is_whole = scheme.group_size >= weight.in_features
    size = next((size for size in _GROUP_SIZES if is_whole or scheme.group_size % size == 0), scheme.group_size)
    return replace(weight, scheme=replace(scheme, inputs="int8", input_group_size=size))
