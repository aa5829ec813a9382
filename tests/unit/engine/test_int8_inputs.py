# SPDX-License-Identifier: Apache-2.0
"""Which weights get inputs of int8, and how many inputs share a scale."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.quantized_weights import random_quantized
from wavetrain_engine.quantization.int8_inputs import with_int8_inputs
from wavetrain_kernels.ops import QuantizationScheme
from wavetrain_kernels.quantized_weight import ValueFormat

NUM_INPUTS = 960


@pytest.mark.parametrize("values", ["int4", "int8"])
@pytest.mark.parametrize(
    ("group_size", "expected"),
    [(16, 16), (32, 32), (48, 16), (64, 64), (96, 32), (128, 128), (192, 64), (256, 128), (960, 128), (1024, 128)],
)
def test_groups_of_inputs_lie_within_those_of_the_weight(values: ValueFormat, group_size: int, expected: int) -> None:
    scheme = QuantizationScheme(values=values, group_size=group_size, has_offsets=True)
    weight = with_int8_inputs(random_quantized(scheme, 4, NUM_INPUTS))
    assert weight.scheme == replace(scheme, inputs="int8", input_group_size=expected)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(values="fp8", group_size=128),
        QuantizationScheme(values="int4", group_size=64, has_codebook=True),
        QuantizationScheme(values="int8", group_size=NUM_INPUTS, inputs="int8"),
        QuantizationScheme(values="fp8", group_size=NUM_INPUTS, inputs="fp8"),
    ],
)
def test_other_weights_stay_as_they_are(scheme: QuantizationScheme) -> None:
    weight = random_quantized(scheme, 4, NUM_INPUTS)
    assert with_int8_inputs(weight) is weight
