# SPDX-License-Identifier: Apache-2.0
"""8-bit rows between a norm or a gate and the projection behind it: fused, they are what unfused ones are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fakes.quantized_weights import every_scheme, random_quantized
from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.gpu import quantized_rows
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.gpu.quantized_packing import pack
from wavetrain_kernels.gpu.quantized_rows import new_inputs, quantize_rows
from wavetrain_kernels.ops import PackedWeight, QuantizedInputs, dispatch
from wavetrain_kernels.reference.quantized_linear import quantize_inputs

# NumPy's, interpreting: 1 / (1 + inf) is right, but said aloud.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
ROUNDED = ["w8a8", "w8a8-static", "fp8", "fp8-static", "fp8-block"]


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The kernels answer, and round from the first row on."""
    monkeypatch.setitem(dispatch._CHOSEN, device.type, GPU)
    monkeypatch.setattr(quantized_rows, "MOST_WIDENED", 0)


def packed(name: str, out_features: int, in_features: int, device: torch.device, **options: bool) -> PackedWeight:
    weight = random_quantized(every_scheme(in_features)[name], out_features, in_features, device=str(device))
    return ops.pack_quantized(weight, dtype=DTYPE, **options)


def in_order(rows: QuantizedInputs) -> Tensor:
    """The values as the inputs lie [T, K]: the halves of each 128 are interleaved."""
    return rows.values.float().unflatten(1, (-1, 64, 2)).transpose(-1, -2).flatten(1)[:, : rows.in_features]


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize(("num_rows", "in_features"), [(1, 128), (3, 200), (2, 1000)])
def test_rows_are_rounded_as_the_reference_rounds_them(name, num_rows, in_features, device):
    weight = random_quantized(every_scheme(in_features)[name], 16, in_features, device=str(device))
    x = (torch.randn(num_rows, in_features, device=device) * 3).to(DTYPE)
    x[0, :128] /= 1000  # among the smallest numbers, where the scale is of the whole row
    rows = new_inputs(pack(weight, DTYPE, False), num_rows)
    assert rows is not None
    quantize_rows(rows, x)
    values, scales = quantize_inputs(x, weight)
    torch.testing.assert_close(rows.scales, scales if rows.scales.shape[1] > 1 else scales[:, :1])
    # A quotient may fall on the other side of a border between two values.
    assert (in_order(rows) != values.float()).float().mean() < 0.002
    torch.testing.assert_close(in_order(rows), values.float(), rtol=0.13, atol=1)
    assert not rows.values.float().unflatten(1, (-1, 64, 2)).transpose(-1, -2).flatten(1)[:, in_features:].any()


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", ["w8a8", "fp8-block"])
def test_behind_a_norm(name, adds, weight_offset, device):
    x, residual = (torch.randn(5, 400, device=device).to(DTYPE)[:, ::2] for _ in range(2))
    norm_weight, weight = torch.randn(200, device=device).to(DTYPE), packed(name, 40, 200, device)
    if adds:
        rows, total = ops.add_rms_norm(x, residual, norm_weight, 1e-5, weight_offset=weight_offset, inputs_for=weight)
        plain, expected = ops.add_rms_norm(x, residual, norm_weight, 1e-5, weight_offset=weight_offset)
        assert torch.equal(total, expected)
    else:
        rows = ops.rms_norm(x, norm_weight, 1e-5, weight_offset=weight_offset, inputs_for=weight)
        plain = ops.rms_norm(x, norm_weight, 1e-5, weight_offset=weight_offset)
    assert isinstance(rows, QuantizedInputs)
    torch.testing.assert_close(ops.linear(rows, weight), ops.linear(plain, weight), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", ["w8a8", "fp8", "fp8-block"])
def test_through_a_gated_block(name, has_bias, device):
    x = torch.randn(5, 128, device=device).to(DTYPE)
    gate_up, down = packed(name, 400, 128, device, is_gated=True), packed(name, 24, 200, device)
    bias = torch.randn(400, device=device).to(DTYPE) if has_bias else None
    rows = ops.rms_norm(x, torch.ones(128, dtype=DTYPE, device=device), 1e-5, inputs_for=gate_up)
    units = ops.gated_linear(rows, gate_up, "silu", bias, inputs_for=down)
    assert isinstance(units, QuantizedInputs)
    plain = ops.gated_linear(rows, gate_up, "silu", bias)
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(ops.linear(units, down), ops.linear(plain, down), rtol=0.01, atol=0.01)


def test_who_takes_rows_as_they_are(device, monkeypatch):
    x, norm_weight = torch.randn(5, 256, device=device).to(DTYPE), torch.ones(256, dtype=DTYPE, device=device)

    def is_rounded(weight: PackedWeight | None, rows: Tensor = x) -> bool:
        return isinstance(ops.rms_norm(rows, norm_weight, 1e-5, inputs_for=weight), QuantizedInputs)

    rounded = packed("w8a8", 16, 256, device)
    assert is_rounded(rounded)
    assert not is_rounded(None)
    assert not is_rounded(packed("w4a16-g32", 16, 256, device))
    assert not is_rounded(ops.pack_weight(torch.randn(16, 256, dtype=DTYPE, device=device)))
    assert not is_rounded(rounded, x[:, None])
    monkeypatch.setattr(quantized_rows, "MOST_WIDENED", 5)
    assert not is_rounded(rounded)
    assert is_rounded(rounded, torch.cat([x, x]))
    monkeypatch.setattr(quantized_rows, "_MAX_SIZE", 255)
    assert not is_rounded(rounded, torch.cat([x, x]))


def test_rows_for_another_weight(device):
    x, norm_weight = torch.randn(5, 256, device=device).to(DTYPE), torch.ones(256, dtype=DTYPE, device=device)
    one, other = packed("w8a8", 16, 256, device), packed("w8a8", 16, 256, device)
    rows = ops.rms_norm(x, norm_weight, 1e-5, inputs_for=one)
    with pytest.raises(ShapeError, match="x was rounded for another weight"):
        ops.linear(rows, other)
    with pytest.raises(ShapeError, match="must take 256 inputs, it takes 128"):
        ops.rms_norm(x, norm_weight, 1e-5, inputs_for=packed("w8a8", 16, 128, device))
    with pytest.raises(DtypeError, match=r"must take torch\.float32"):
        ops.rms_norm(x.float(), norm_weight.float(), 1e-5, inputs_for=one)
    gated = packed("w8a8", 32, 256, device, is_gated=True)
    with pytest.raises(ShapeError, match="must take 16 inputs, it takes 256"):
        ops.gated_linear(x, gated, "silu", inputs_for=one)
