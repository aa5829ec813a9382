# SPDX-License-Identifier: Apache-2.0
"""Normalization against the Hugging Face layers: the reference to the bit, compiled sets but for the order of a sum."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.kernel_set import KernelSet

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 24), (1, 855), (5, 64), (3, 4, 16), (2, 1), (2, 3, 2, 40), (40, 1000)]
# One unit in the last place, or two for the two roundings of bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 0.0}


def llama_norm(weight: torch.Tensor) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(weight.shape[0], eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def gemma_norm(weight: torch.Tensor) -> Gemma2RMSNorm:
    norm = Gemma2RMSNorm(weight.shape[0], eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def assert_equal(result: torch.Tensor, expected: torch.Tensor, kernels: KernelSet) -> None:
    tolerance = 0.0 if kernels.name == "reference" else TOLERANCES[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=0.0)
    # A sum in another order moves few roundings.
    assert (result != expected).sum() <= result.numel() * (0 if not tolerance else 0.02 if tolerance > 1e-3 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("make_oracle", "offset"), [(llama_norm, 0.0), (gemma_norm, 1.0)], ids=["llama", "gemma"])
def test_rms_norm_is_hugging_face(shape, dtype, make_oracle, offset, kernels):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, *shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    oracle = make_oracle(weight)
    assert_equal(ops.rms_norm(x, weight, 1e-5, weight_offset=offset), oracle(x), kernels)
    before = residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, weight_offset=offset)
    assert torch.equal(total, x + residual)
    assert_equal(normed, oracle(x + residual), kernels)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_view(dtype, kernels):
    fused = torch.randn(4, 6, 40).to(dtype)
    weight = torch.randn(40).to(dtype)
    for view in (fused[:, 1:3], fused[::2, ::3], fused.transpose(0, 1), fused[..., 0, :]):
        assert_equal(ops.rms_norm(view, weight, 1e-5), llama_norm(weight)(view), kernels)
    spread = torch.randn(4, 80).to(dtype)[:, ::2]
    assert_equal(ops.rms_norm(spread, weight, 1e-5), llama_norm(weight)(spread), kernels)
    for normed, total in (ops.add_rms_norm(fused[:, 1], spread, weight, 1e-5),):
        assert torch.equal(total, fused[:, 1] + spread)
        assert_equal(normed, llama_norm(weight)(total), kernels)


def test_a_row_does_not_depend_on_the_others():
    x, residual = torch.randn(2, 70, 300).bfloat16()
    weight = torch.randn(300).bfloat16()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    for row in (0, 33, 69):
        alone, _ = ops.add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, 1e-5)
        assert torch.equal(alone[0], normed[row])
        assert torch.equal(ops.rms_norm(total[row : row + 1], weight, 1e-5)[0], normed[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype):
    x = torch.ones(4, 50).to(dtype)
    x[1, 7], x[2, 49] = float("nan"), float("inf")
    normed = ops.rms_norm(x, torch.ones(50).to(dtype), 1e-5)
    assert normed[1].isnan().all()
    assert normed[2].isnan().any()
    assert normed[[0, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(()), torch.zeros(1), ShapeError, "x must be"),
        (torch.zeros(2, 3), torch.zeros(2), ShapeError, "x must be"),
        (torch.zeros(2, 3), torch.zeros(3, 1), ShapeError, "x must be"),
        (torch.zeros(2, 3), torch.zeros(3).half(), DtypeError, "one floating-point dtype"),
        (torch.zeros(2, 3).int(), torch.zeros(3).int(), DtypeError, "one floating-point dtype"),
    ],
)
def test_norm_that_does_not_fit(x, weight, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(x, weight, 1e-6)
    with pytest.raises(error, match=message):
        ops.add_rms_norm(x, x, weight, 1e-6)


def test_residual_that_does_not_fit():
    with pytest.raises(ShapeError, match="one shape"):
        ops.add_rms_norm(torch.zeros(2, 3), torch.zeros(1, 3), torch.ones(3), 1e-6)
    with pytest.raises(DtypeError, match="one dtype"):
        ops.add_rms_norm(torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.ones(3), 1e-6)
