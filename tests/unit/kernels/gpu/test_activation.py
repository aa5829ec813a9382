# SPDX-License-Identifier: Apache-2.0
"""The GPU's products, gates and embeddings against the reference."""

from __future__ import annotations

import logging

import pytest
import torch

from wavetrain_kernels import ops
from wavetrain_kernels.gpu.activation import gated_activation
from wavetrain_kernels.gpu.gated_product import MAX_ROWS, can_fuse, gated_product, gated_product_config
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.gpu.launch import A100, H200, fall_back
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kernels import REFERENCE

# The interpreter computes the sigmoid as NumPy does: 1 / (1 + inf) is right, but said aloud.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
ACTIVATIONS = ["silu", "gelu_tanh"]


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def made(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 100, 855, 1024, 2050])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_gated_activation(num_rows, size, activation, dtype, device):
    gate_up = 3 * made(device, dtype, num_rows, 2 * size)
    memory = torch.full((num_rows * size + 32,), float("nan"), dtype=dtype, device=device)
    out = memory[: num_rows * size].view(num_rows, size)
    gated_activation(out, gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    act = (
        torch.nn.functional.silu if activation == "silu" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )
    assert_close(out, act(gate) * up)
    assert memory[num_rows * size :].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_out(activation, device):
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    out = torch.empty(1, 5, device=device)
    gated_activation(out, gate_up, activation)
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 17])
def test_gated_linear(num_rows, has_bias, activation, dtype, device):
    x, weight = made(device, dtype, num_rows, 24), made(device, dtype, 34, 24) / 5
    bias = made(device, dtype, 34) if has_bias else None
    out, expected = (torch.empty(num_rows, 17, dtype=dtype, device=device) for _ in range(2))
    GPU.gated_linear(out, x, GPU.pack_weight(weight, True), bias, activation)
    REFERENCE.gated_linear(expected, x, weight, bias, activation)
    assert_close(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "size", "in_features"), [(1, 70, 136), (16, 33, 64), (5, 64, 256), (3, 1, 8)])
def test_gated_product(num_rows, size, in_features, has_bias, activation, device):
    """Alone, with rows and outputs that fill no tile; what lies around must stay."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x, weight = (
        made(device, dtype, num_rows, 2 * in_features)[:, :in_features],
        made(device, dtype, 2 * size, in_features),
    )
    weight = weight / in_features**0.5
    bias = made(device, dtype, 2 * size) if has_bias else None
    memory = torch.full((num_rows * size + 32,), float("nan"), dtype=dtype, device=device)
    out, expected = (
        memory[: num_rows * size].view(num_rows, size),
        torch.empty(num_rows, size, dtype=dtype, device=device),
    )
    assert can_fuse(x, weight)
    gated_product(out, x, weight, bias, activation)
    REFERENCE.gated_linear(expected, x, weight, bias, activation)
    assert_close(out, expected)
    assert memory[num_rows * size :].isnan().all()


def test_what_one_launch_does(device, monkeypatch):
    def is_fused(num_rows, in_features=64, dtype=torch.float16, step=1):
        x = made(device, dtype, num_rows, step * in_features)[:, ::step]
        return can_fuse(x, made(device, dtype, 6, in_features))

    assert is_fused(MAX_ROWS)
    assert is_fused(0)
    assert not is_fused(MAX_ROWS + 1)
    assert not is_fused(1, dtype=torch.float32)
    assert not is_fused(1, in_features=65)
    assert not is_fused(1, step=2)
    asked: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(
        "wavetrain_kernels.gpu.gated_product.tuned", lambda *key: asked.append(key) or {"is_fused": False}
    )
    assert not is_fused(1)
    assert asked == [("gated_product", (3, 64), device)]


def test_configurations_fit_their_device():
    for traits in (A100, H200):
        for size in (855, 4864, 14336):
            config = gated_product_config(size, traits)
            tile_bytes = 2 * config.block_k * (2 * config.block_n + MAX_ROWS)
            assert 2 <= config.num_stages <= 5
            assert 2 * config.num_stages * tile_bytes <= traits.shared_bytes
    assert gated_product_config(14336, H200, {"num_stages": 3, "block_k": 128}).num_stages == 3


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_linear(num_rows, is_wide, has_bias, dtype, device):
    x, weight = made(device, dtype, num_rows, 2 * 24)[:, ::2], made(device, dtype, 33, 24) / 5
    bias = made(device, dtype, 33) if has_bias else None
    out_dtype = torch.float32 if is_wide else dtype
    out = torch.empty(num_rows, 33, dtype=out_dtype, device=device)
    address = out.data_ptr()
    GPU.linear(out, x, GPU.pack_weight(weight, False), bias)
    assert out.data_ptr() == address
    expected = x.float() @ weight.float().t() + (0 if bias is None else bias.float())
    assert_close(out, expected.to(out_dtype))


def test_a_packed_weight_is_the_weight(dtype, device):
    weight = made(device, dtype, 6, 8)
    assert GPU.pack_weight(weight, True) is weight
    assert GPU.pack_weight(weight[:, :4], False).data_ptr() == weight.data_ptr()
    turned = GPU.pack_weight(weight.t(), False)
    assert turned.is_contiguous()
    assert torch.equal(turned, weight.t())


@pytest.mark.parametrize("size", [1, 100, 1024, 1500])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_embedding(size, scale, dtype, device):
    table, token_ids = made(device, dtype, 11, size), torch.tensor([10, 0, 3, 3, 9, 1], device=device)
    for ids in (token_ids, token_ids[::2], token_ids[:0]):
        out, expected = (torch.empty(ids.shape[0], size, dtype=dtype, device=device) for _ in range(2))
        GPU.embedding(out, table, ids, scale, False)
        REFERENCE.embedding(expected, table, ids, scale, False)
        assert torch.equal(out, expected)


def test_a_table_may_be_what_linear_multiplies_by(dtype, device, monkeypatch):
    monkeypatch.setattr(dispatch, "_CHOSEN", {device.type: GPU})
    weight = made(device, dtype, 9, 32)
    packed = ops.pack_weight(weight)
    token_ids = torch.tensor([8, 0, 2], device=device)
    assert torch.equal(ops.embedding(token_ids, packed), weight[token_ids])


def test_what_is_not_served_goes_to_the_reference_and_is_said_once(device, caplog):
    fall_back.cache_clear()
    x, weight = made(device, torch.float64, 3, 8), made(device, torch.float64, 4, 8)
    out, looked_up = (torch.empty(3, size, dtype=torch.float64, device=device) for size in (2, 8))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            GPU.gated_linear(out, x, weight, None, "silu")
            GPU.embedding(looked_up, weight, torch.tensor([3, 0, 1], device=device), 1.0, False)
    expected = torch.empty_like(out)
    REFERENCE.gated_linear(expected, x, weight, None, "silu")
    assert torch.equal(out, expected)
    assert torch.equal(looked_up, weight[[3, 0, 1]])
    assert len(caplog.records) == 2
