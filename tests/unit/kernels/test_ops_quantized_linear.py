# SPDX-License-Identifier: Apache-2.0
"""Linear layers over quantized weights against their definition."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from fakes.quantized_weights import every_scheme, random_quantized
from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight, dispatch
from wavetrain_kernels.quantized_weight import can_stack, stack
from wavetrain_kernels.reference.quantized_linear import round_inputs

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
# Rows, outputs, inputs.
SIZES = [(0, 8, 64), (1, 2, 32), (1, 64, 256), (3, 34, 96), (5, 130, 200), (17, 96, 384), (40, 64, 256)]
NAMES = sorted(every_scheme(32))


def definition(weight: QuantizedWeight) -> torch.Tensor:
    """The dequantized weight in float64, element by element as the docstring of the module has it."""
    scheme, dense = weight.scheme, torch.zeros(weight.out_features, weight.in_features, dtype=torch.float64)
    for row in range(weight.out_features):
        for column in range(weight.in_features):
            at = row // scheme.block_rows, column // scheme.group_size
            value = weight.values[row, column // 2 if scheme.values == "int4" else column]
            if scheme.values == "int4":
                code = (int(value) >> (4 * (column % 2))) & 15
                number = code - 8 if weight.codebook is None else float(weight.codebook[code])
            else:
                number = float(value)
            place = column if weight.column_order is None else int(weight.column_order[column])
            offset = 0.0 if weight.offsets is None else float(weight.offsets[at])
            dense[row, place] = number * float(weight.scales[at]) - offset
    return dense


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_dequantizes_as_defined(name):
    weight = random_quantized(every_scheme(136)[name], 5, 136)
    torch.testing.assert_close(ops.dequantize(weight).double(), definition(weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_dequantized_weight(name, dtype):
    for num_rows, num_outputs, num_inputs in SIZES:
        weight = random_quantized(every_scheme(num_inputs)[name], num_outputs, num_inputs)
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
        bias = torch.randn(num_outputs, generator=generator).to(dtype)
        packed, dense = ops.pack_quantized(weight, dtype=dtype), ops.dequantize(weight).double()
        # Inputs may be kept finer than the scheme asks for: with fp8 by as much as its rounding.
        tolerance = DTYPES[dtype] + {None: 0.0, "int8": 2**-6, "fp8": 2**-3}[weight.scheme.inputs]
        exact = round_inputs(x, weight).double() @ dense.T
        if weight.scheme.inputs is None and dtype != torch.float32:
            tolerance *= 2  # weights may be rounded to the inputs' dtype
        for result, expected in (
            (ops.linear(x, packed), exact),
            (ops.linear(x, packed, bias), exact + bias.double()),
            (ops.linear(x, packed, dtype=torch.float32), exact),
        ):
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
        gated = ops.gated_linear(x, ops.pack_quantized(weight, dtype=dtype, is_gated=True), "silu", bias)
        gate, up = (exact + bias.double()).chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(gated.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if every_scheme(32)[name].inputs == "int8"])
def test_products_of_integers_are_exact(kernels: KernelSet, name: str):
    """Rows are rounded to the same integers as the definition's, so that only the last product rounds."""
    weight = random_quantized(every_scheme(300)[name], 70, 300)
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = round_inputs(x, weight).double() @ ops.dequantize(weight).double().T
    result = ops.linear(x, ops.pack_quantized(weight, dtype=x.dtype), dtype=torch.float32)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


GROUPED = {
    "w4a8-g32": QuantizationScheme(values="int4", group_size=32, inputs="int8"),
    "w4a8-asym": QuantizationScheme(
        values="int4", group_size=256, inputs="int8", input_group_size=64, has_offsets=True
    ),
    "w8a8-g48": QuantizationScheme(values="int8", group_size=48, inputs="int8", input_group_size=96),
    "w8a8-act-order": QuantizationScheme(
        values="int8", group_size=16, inputs="int8", input_group_size=32, has_offsets=True, is_reordered=True
    ),
    "w8a8-in64": QuantizationScheme(values="int8", group_size=1 << 20, inputs="int8", input_group_size=64),
    "w4a8-in16": QuantizationScheme(values="int4", group_size=16, inputs="int8", input_group_size=16, has_offsets=True),
    "w4a16-g48-asym": QuantizationScheme(values="int4", group_size=48, has_offsets=True),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_fill_no_tile(name: str):
    """And inputs in groups of their own, of which there are more than the weight's, or fewer."""
    for num_rows, num_inputs in ((1, 272), (9, 250), (40, 700)):
        weight = random_quantized(GROUPED[name], 70, num_inputs)
        x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
        exact = round_inputs(x, weight).double() @ ops.dequantize(weight).double().T
        result = ops.linear(x, ops.pack_quantized(weight, dtype=x.dtype), dtype=torch.float32)
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, *GROUPED])
def test_a_row_is_the_same_in_any_batch(kernels: KernelSet, name: str):
    """To the bit, as of weights that are not quantized."""
    if kernels.name == "reference":
        pytest.skip("PyTorch's products depend on the batch")
    schemes = {**every_scheme(1100), **GROUPED}
    weight = random_quantized(schemes[name], 98, 1100)
    x = torch.randn(70, 1100, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain = ops.pack_quantized(weight, dtype=x.dtype)
    gates = ops.pack_quantized(weight, dtype=x.dtype, is_gated=True)
    together = ops.linear(x, plain, dtype=torch.float32), ops.gated_linear(x, gates, "silu")
    for start, stop in ((0, 1), (5, 7), (69, 70), (3, 8), (10, 43), (1, 7)):
        alone = ops.linear(x[start:stop], plain, dtype=torch.float32), ops.gated_linear(x[start:stop], gates, "silu")
        for result, expected in zip(alone, together, strict=True):
            assert torch.equal(result, expected[start:stop])


def test_what_is_no_number_stays_in_its_row():
    for name in NAMES:
        weight = random_quantized(every_scheme(64)[name], 40, 64)
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        x[3, 7], x[18, 0] = float("nan"), float("inf")
        if weight.scheme.has_input_scale:
            x[18, 0] = float("nan")  # an infinity is cut to the largest number
        packed = ops.pack_quantized(weight, dtype=x.dtype)
        if isinstance(packed.data, QuantizedWeight) and weight.scheme.inputs is not None:
            continue  # what PyTorch makes an integer of
        result = ops.linear(x, packed)
        assert (~result.isfinite()).all(-1).nonzero().squeeze(1).tolist() == [3, 18], name


def test_values_that_no_kernel_has_are_held_unquantized(kernels: KernelSet):
    weight = random_quantized(every_scheme(64)["fp8a16"], 8, 64)
    weight.values.view(torch.uint8)[2, 5] = 0x7F
    packed = ops.pack_quantized(weight, dtype=torch.bfloat16)
    assert kernels.name == "reference" or packed.scheme is None
    result = ops.linear(torch.ones(1, 64).bfloat16(), packed)
    assert result[0].isnan().nonzero().squeeze(1).tolist() == [2]


def test_a_scheme_without_a_kernel_is_held_unquantized(kernels: KernelSet, monkeypatch, caplog):
    name = f"narrow {kernels.name} {id(monkeypatch)}"  # it is said once for each set and scheme
    narrow = dataclasses.replace(kernels, name=name, pack_quantized=lambda *_: None)
    monkeypatch.setattr(dispatch, "_CHOSEN", {"cpu": narrow})
    weight = random_quantized(every_scheme(64)["w4a16-g32"], 8, 64)
    with caplog.at_level(logging.WARNING):
        packed = ops.pack_quantized(weight, dtype=torch.float32)
        ops.pack_quantized(weight, dtype=torch.float32)
    assert packed.scheme is None
    assert len([record for record in caplog.records if name in record.message]) == 1
    x = torch.randn(3, 64)
    torch.testing.assert_close(ops.linear(x, packed), x @ ops.dequantize(weight).T, rtol=1e-5, atol=1e-5)


def test_weights_of_one_scheme_stack_by_rows():
    for name, scheme in every_scheme(256).items():
        parts = [random_quantized(scheme, rows, 256, seed=1) for rows in (128, 96)]
        if scheme.is_reordered:
            parts[1] = dataclasses.replace(parts[1], column_order=parts[0].column_order)
        dense = torch.cat([ops.dequantize(part) for part in parts])
        assert can_stack(parts), name
        assert torch.equal(ops.dequantize(stack(parts)), dense), name


def test_what_does_not_stack_is_refused():
    schemes = every_scheme(256)
    unequal = [
        [random_quantized(schemes["w4a16-g32"], 8, 256), random_quantized(schemes["w4a16-g128"], 8, 256)],
        [random_quantized(schemes["w4a16-g32"], 8, 256), random_quantized(schemes["w4a16-g32"], 8, 128)],
        [random_quantized(schemes["fp8-block"], 100, 256), random_quantized(schemes["fp8-block"], 128, 256)],
        [random_quantized(schemes["w4a16-g128-act-order"], 8, 256, seed=seed) for seed in (0, 1)],
    ]
    for parts in unequal:
        assert not can_stack(parts)
        with pytest.raises(ShapeError, match="different schemes"):
            stack(parts)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("values", torch.zeros(8, 64, dtype=torch.uint8), ShapeError),
        ("values", torch.zeros(8, 32, dtype=torch.int8), DtypeError),
        ("scales", torch.zeros(8, 1), ShapeError),
        ("scales", torch.zeros(8, 2, dtype=torch.float16), DtypeError),
        ("offsets", torch.zeros(8, 2), ShapeError),
        ("codebook", torch.zeros(16), ShapeError),
        ("column_order", torch.arange(64), ShapeError),
        ("input_scale", torch.ones(1), ShapeError),
    ],
)
def test_what_does_not_fit_its_scheme_is_refused(field, value, error):
    weight = random_quantized(every_scheme(64)["w4a16-g32"], 8, 64)
    with pytest.raises(error):
        dataclasses.replace(weight, **{field: value})


def test_wrong_packings_are_refused():
    weight = random_quantized(every_scheme(64)["w4a16-g32"], 7, 64)
    with pytest.raises(ShapeError, match="even number"):
        ops.pack_quantized(weight, dtype=torch.float32, is_gated=True)
    with pytest.raises(DtypeError, match="floating point"):
        ops.pack_quantized(weight, dtype=torch.int8)
    packed = ops.pack_quantized(weight, dtype=torch.float32)
    with pytest.raises(DtypeError, match="one floating-point dtype"):
        ops.linear(torch.zeros(1, 64, dtype=torch.float16), packed)
    with pytest.raises(ShapeError, match="T, 64"):
        ops.linear(torch.zeros(1, 32), packed)


def test_a_row_of_zeros_stays_zero():
    for inputs in ("int8", "fp8"):
        scheme = next(s for s in every_scheme(64).values() if s.inputs == inputs and not s.has_input_scale)
        packed = ops.pack_quantized(random_quantized(scheme, 8, 64), dtype=torch.float32)
        assert torch.equal(ops.linear(torch.zeros(2, 64), packed), torch.zeros(2, 8))
