# SPDX-License-Identifier: Apache-2.0
"""Packed linear layers against a product in float64, and that no row depends on the batch it is in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
# Rows, outputs, inputs: on both sides of tiles of 16 and 32.
SIZES = [(0, 8, 8), (1, 2, 1), (1, 32, 64), (3, 34, 33), (16, 48, 31), (17, 96, 96), (33, 64, 100), (70, 130, 257)]


def random_layer(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) / num_inputs**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(num_outputs, generator=generator).to(dtype)


def gated(y: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_is_the_product(size, dtype):
    x, weight, bias = random_layer(*size, dtype)
    packed, exact = ops.pack_weight(weight), x.double() @ weight.double().T
    tolerance = TOLERANCES[dtype]
    for result, expected in (
        (ops.linear(x, packed), exact),
        (ops.linear(x, packed, bias), exact + bias.double()),
        (ops.linear(x, packed, dtype=torch.float32), exact),
    ):
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert ops.linear(x, packed).dtype == dtype
    assert ops.linear(x, packed, dtype=torch.float32).dtype == torch.float32


def test_logits_in_float32_are_not_rounded(kernels: KernelSet):
    if kernels.name == "reference":
        pytest.skip("the reference rounds to the input's dtype first")
    x, weight, _ = random_layer(4, 64, 256, torch.bfloat16)
    result = ops.linear(x, ops.pack_weight(weight), dtype=torch.float32)
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gated_linear_is_the_gated_product(size, dtype, activation):
    x, weight, bias = random_layer(*size, dtype)
    packed, exact = ops.pack_weight(weight, is_gated=True), x.double() @ weight.double().T
    tolerance = 4 * TOLERANCES[dtype]  # the reference rounds gates and ups before it multiplies them
    for result, expected in (
        (ops.gated_linear(x, packed, activation), exact),
        (ops.gated_linear(x, packed, activation, bias), exact + bias.double()),
    ):
        assert result.shape == (size[0], size[1] // 2)
        torch.testing.assert_close(result.double(), gated(expected, activation), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_inputs", [1, 31, 32, 96, 257])
@pytest.mark.parametrize("is_packed", [False, True])
def test_embeddings_are_rows_of_the_table(num_inputs, is_packed):
    for dtype in DTYPES:
        weight = torch.randn(70, num_inputs).to(dtype)
        table = ops.pack_weight(weight) if is_packed else weight
        assert torch.equal(ops.embedding(torch.arange(70), table), weight)
        rows = torch.tensor([69, 0, 33, 33, 16])
        assert torch.equal(ops.embedding(rows, table), weight[rows])
        assert torch.equal(ops.embedding(rows, table, scale=55.5), weight[rows] * 55.5)
        assert ops.embedding(rows[:0], table).shape == (0, num_inputs)


def test_inputs_that_lie_apart():
    x, weight, bias = random_layer(6, 40, 50, torch.bfloat16)
    expected = ops.linear(x, ops.pack_weight(weight), bias)
    wide = torch.zeros(6, 99, dtype=torch.bfloat16)
    for view in (wide[:, 10:60], wide[:, :99:2]):
        view.copy_(x)
        assert torch.equal(ops.linear(view, ops.pack_weight(weight), bias), expected)
    turned = weight.T.contiguous().T
    assert torch.equal(ops.linear(x, ops.pack_weight(turned), bias), expected)
    assert torch.equal(ops.linear(x, ops.pack_weight(torch.cat((weight, weight), 1)[:, :50]), bias), expected)


@pytest.mark.parametrize("num_inputs", [64, 100, 3000])
def test_a_row_is_the_same_in_any_batch(kernels: KernelSet, num_inputs: int):
    """To the bit: preempting a request, or serving it beside others, must not change its tokens."""
    if kernels.name == "reference":
        pytest.skip("PyTorch's products depend on the batch")
    x, weight, bias = random_layer(150, 98, num_inputs, torch.bfloat16)
    plain, gates = ops.pack_weight(weight), ops.pack_weight(weight, is_gated=True)
    together = ops.linear(x, plain, bias), ops.linear(x, plain, dtype=torch.float32), ops.gated_linear(x, gates, "silu")
    for start, stop in ((0, 1), (5, 6), (149, 150), (3, 19), (10, 43), (0, 128)):
        part = x[start:stop]
        alone = ops.linear(part, plain, bias), ops.linear(part, plain, dtype=torch.float32)
        for result, expected in zip((*alone, ops.gated_linear(part, gates, "silu")), together, strict=True):
            assert torch.equal(result, expected[start:stop])


def test_nan_and_infinity_stay_in_their_row():
    x, weight, _ = random_layer(20, 40, 64, torch.bfloat16)
    x[3, 7], x[18, 0] = float("nan"), float("inf")
    result = ops.linear(x, ops.pack_weight(weight))
    assert (~result.isfinite()).all(-1).nonzero().squeeze(1).tolist() == [3, 18]
    assert result[[0, 1, 2, 4, 17, 19]].isfinite().all()


X, WEIGHT = torch.zeros(2, 5), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.zeros(()), WEIGHT, None, ShapeError, "x must be"),
        (torch.zeros(1, 2, 5), WEIGHT, None, ShapeError, "x must be"),
        (torch.zeros(2, 4), WEIGHT, None, ShapeError, "x must be"),
        (X.half(), WEIGHT, None, DtypeError, "x and weight"),
        (X.int(), WEIGHT, None, DtypeError, "x and weight"),
        (X, WEIGHT, torch.zeros(5), ShapeError, "bias must be .4., got .5."),
        (X, WEIGHT, torch.zeros(4, 1), ShapeError, "bias must be"),
        (X, WEIGHT, torch.zeros(4).half(), DtypeError, "x and bias"),
        (X, WEIGHT, torch.zeros(8)[::2], ShapeError, "bias must be contiguous"),
    ],
)
def test_layers_that_do_not_fit(x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        ops.linear(x, ops.pack_weight(weight), bias)
    with pytest.raises(error, match=message):
        ops.gated_linear(x, ops.pack_weight(weight, is_gated=True), "silu", bias)


def test_weights_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"weight must be \[out, in\], got"):
        ops.pack_weight(torch.zeros(5))
    with pytest.raises(ShapeError, match="out even, got"):
        ops.pack_weight(torch.zeros(3, 5), is_gated=True)
    with pytest.raises(DtypeError, match="floating point"):
        ops.pack_weight(torch.zeros(4, 5).int())
    plain, gates = ops.pack_weight(WEIGHT), ops.pack_weight(WEIGHT, is_gated=True)
    with pytest.raises(ShapeError, match="for gated_linear"):
        ops.linear(X, gates)
    with pytest.raises(ShapeError, match="packed with is_gated"):
        ops.gated_linear(X, plain, "silu")
    with pytest.raises(DtypeError, match="the result must be"):
        ops.linear(X, plain, dtype=torch.bfloat16)


def test_tables_that_do_not_fit():
    ids = torch.tensor([0])
    with pytest.raises(ShapeError, match="a gated weight is not a table"):
        ops.embedding(ids, ops.pack_weight(WEIGHT, is_gated=True))
    with pytest.raises(ShapeError, match=r"token_ids must be \[T\]"):
        ops.embedding(ids[None], WEIGHT)
    with pytest.raises(DtypeError, match="token_ids must be int64"):
        ops.embedding(ids.int(), WEIGHT)
    with pytest.raises(ShapeError, match="contiguous"):
        ops.embedding(ids, WEIGHT.t())
    with pytest.raises(DtypeError, match="floating point"):
        ops.embedding(ids, WEIGHT.int())
