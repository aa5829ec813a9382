# SPDX-License-Identifier: Apache-2.0
"""The GPU's RMS norms against the reference."""

from __future__ import annotations

import logging

import pytest
import torch

from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.gpu.launch import fall_back
from wavetrain_kernels.gpu.norm import norm_config
from wavetrain_kernels.reference.kernels import REFERENCE

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """An output, and the NaN around it that must stay."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), float("nan"), dtype=dtype, device=device)
    return memory[32 : 32 + size].view(shape), memory


def assert_untouched(memory: torch.Tensor) -> None:
    assert memory[:32].isnan().all()
    assert memory[-32:].isnan().all()


@pytest.mark.parametrize("size", [1, 16, 64, 80, 255, 256, 300, 855, 4096])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_rms_norm(size, num_rows, weight_offset, dtype, device):
    x, weight = torch.randn(num_rows, size, device=device).to(dtype), torch.randn(size, device=device).to(dtype)
    before = x.clone()
    (out, memory), expected = guarded(x.shape, dtype, device), torch.empty_like(x)
    GPU.rms_norm(out, x, weight, EPS, weight_offset)
    REFERENCE.rms_norm(expected, x, weight, EPS, weight_offset)
    assert_close(out, expected)
    assert_untouched(memory)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [17, 300, 1024])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 70])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_add_rms_norm(size, num_rows, weight_offset, dtype, device):
    x, residual = (100 * torch.randn(2, num_rows, size, device=device)).to(dtype)
    weight = torch.randn(size, device=device).to(dtype)
    (out, memory), (residual_out, residual_memory) = (guarded(x.shape, dtype, device) for _ in range(2))
    expected, expected_residual = torch.empty_like(x), torch.empty_like(x)
    GPU.add_rms_norm(out, residual_out, x, residual, weight, EPS, weight_offset)
    REFERENCE.add_rms_norm(expected, expected_residual, x, residual, weight, EPS, weight_offset)
    assert torch.equal(residual_out, expected_residual)
    assert_close(out, expected)
    assert_untouched(memory)
    assert_untouched(residual_memory)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_rows_that_lie_apart(num_tokens, dtype, device):
    fused = torch.randn(num_tokens, 9, 48, device=device).to(dtype)
    weight = torch.randn(48, device=device).to(dtype)
    views = [fused[:, 2:6], fused[::2, :3], fused[:, 1], fused[:, :, :].transpose(0, 1), fused[None, :, 4:]]
    for x in views:
        out, expected = (torch.empty(x.shape, dtype=dtype, device=device) for _ in range(2))
        GPU.rms_norm(out, x, weight, EPS, 0.0)
        REFERENCE.rms_norm(expected, x, weight, EPS, 0.0)
        assert_close(out, expected)


def test_elements_that_lie_apart(dtype, device):
    x, residual = torch.randn(2, 40, 6, device=device).to(dtype).transpose(1, 2)
    weight = torch.randn(80, device=device).to(dtype)[::2]
    out, residual_out, expected, expected_residual = (
        torch.empty(x.shape, dtype=dtype, device=device) for _ in range(4)
    )
    GPU.add_rms_norm(out, residual_out, x, residual, weight, EPS, 0.0)
    REFERENCE.add_rms_norm(expected, expected_residual, x, residual, weight, EPS, 0.0)
    assert torch.equal(residual_out, expected_residual)
    assert_close(out, expected)


def test_the_largest_row(device):
    x, weight = torch.randn(2, 16384, device=device), torch.randn(16384, device=device)
    out, expected = torch.empty_like(x), torch.empty_like(x)
    GPU.rms_norm(out, x, weight, EPS, 0.0)
    REFERENCE.rms_norm(expected, x, weight, EPS, 0.0)
    assert_close(out, expected)


@pytest.mark.parametrize(
    ("x", "reason"),
    [(torch.randn(2, 16385), "rows of 16385 elements"), (torch.randn(2, 8).double(), "torch.float64 rows")],
)
def test_what_is_not_served_goes_to_the_reference_and_is_said_once(x, reason, device, caplog):
    fall_back.cache_clear()
    x = x.to(device)
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=device)
    out, sums, expected = (torch.empty_like(x) for _ in range(3))
    with caplog.at_level(logging.WARNING):
        GPU.rms_norm(out, x, weight, EPS, 0.0)
        GPU.add_rms_norm(out, sums, x, torch.zeros_like(x), weight, EPS, 0.0)
    REFERENCE.rms_norm(expected, x, weight, EPS, 0.0)
    assert torch.equal(out, expected)
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_configurations_cover_their_rows():
    for size in (1, 16, 80, 256, 257, 4096, 5120, 16384):
        config = norm_config(size)
        assert config.block_size >= size
        assert config.block_size < 2 * max(size, 16)
        assert config.num_warps * 32 <= config.block_rows * config.block_size
