# SPDX-License-Identifier: Apache-2.0
"""Normalization, rotary embedding, activations and the matrix product against the Hugging Face layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 24), (1, 855), (5, 64), (3, 4, 16)]


def llama_norm(weight: torch.Tensor) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(weight.shape[0], eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def gemma_norm(weight: torch.Tensor) -> Gemma2RMSNorm:
    norm = Gemma2RMSNorm(weight.shape[0], eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("make_oracle", "offset"), [(llama_norm, 0.0), (gemma_norm, 1.0)], ids=["llama", "gemma"])
def test_rms_norm_is_hugging_face_to_the_bit(shape, dtype, make_oracle, offset):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, *shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    oracle = make_oracle(weight)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5, weight_offset=offset), oracle(x))
    before = residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, weight_offset=offset)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, oracle(x + residual))
    assert torch.equal(residual, before)


def test_rms_norm_of_a_view():
    fused = torch.randn(4, 6, 8)
    assert torch.equal(ops.rms_norm(fused[:, 1:3], torch.ones(8), 1e-5), llama_norm(torch.ones(8))(fused[:, 1:3]))


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


def cos_sin_cache(max_position: int, rotary_dim: int) -> torch.Tensor:
    inverse = 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angles = torch.arange(max_position).float()[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("position_dtype", [torch.int64, torch.int32])
def test_rotary_embedding_is_hugging_face(num_tokens, dtype, position_dtype):
    fused = torch.randn(num_tokens, 8, 16).to(dtype)
    query, key = fused[:, :5], fused[:, 5:7]
    positions = torch.tensor([7, 0, 3, 3, 31][:num_tokens], dtype=position_dtype)
    cache = cos_sin_cache(32, 16).to(dtype)
    cos, sin = torch.cat((cache, cache), dim=-1)[positions.long()].unbind(1)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    rotated = ops.rotary_embedding(query, key, positions, cache)
    for result, oracle in zip(rotated, expected, strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, oracle, atol=1e-6, rtol=1e-6)


def test_rotary_embedding_of_a_part_of_the_head():
    query, key = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    cache, positions = cos_sin_cache(8, 8), torch.tensor([1, 2, 7])
    rotated = ops.rotary_embedding(query, key, positions, cache)
    part = ops.rotary_embedding(query[..., :8], key[..., :8], positions, cache)
    for result, expected, x in zip(rotated, part, (query, key), strict=True):
        assert torch.equal(result[..., :8], expected)
        assert torch.equal(result[..., 8:], x[..., 8:])


def test_rotary_embedding_computes_in_the_wider_dtype():
    query, key = torch.randn(2, 3, 1, 16).bfloat16()
    cache, positions = cos_sin_cache(8, 16), torch.tensor([1, 2, 7])
    wide = ops.rotary_embedding(query.float(), key.float(), positions, cache)
    assert torch.equal(ops.rotary_embedding(query, key, positions, cache)[0], wide[0].bfloat16())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(3, 16)}, ShapeError, "query must be"),
        ({"key": torch.zeros(3, 16)}, ShapeError, "query must be"),
        ({"key": torch.zeros(2, 1, 16)}, ShapeError, "query must be"),
        ({"key": torch.zeros(3, 1, 8)}, ShapeError, "query must be"),
        ({"positions": torch.zeros(2).long()}, ShapeError, "positions must be"),
        ({"positions": torch.zeros(3, 1).long()}, ShapeError, "positions must be"),
        ({"cos_sin_cache": torch.zeros(8, 16)}, ShapeError, "cos_sin_cache must be"),
        ({"cos_sin_cache": torch.zeros(8, 1, 8)}, ShapeError, "cos_sin_cache must be"),
        ({"cos_sin_cache": torch.zeros(8, 2, 9)}, ShapeError, "cos_sin_cache must be"),
        ({"query": torch.zeros(3, 2, 16).int()}, DtypeError, "query and key"),
        ({"key": torch.zeros(3, 1, 16).half()}, DtypeError, "query and key"),
        ({"positions": torch.zeros(3)}, DtypeError, "positions must be int64 or int32"),
        ({"cos_sin_cache": torch.zeros(8, 2, 8).int()}, DtypeError, "cos_sin_cache must be floating"),
    ],
)
def test_rotary_embedding_that_does_not_fit(changes, error, message):
    arguments = {
        "query": torch.zeros(3, 2, 16),
        "key": torch.zeros(3, 1, 16),
        "positions": torch.zeros(3).long(),
        "cos_sin_cache": torch.zeros(8, 2, 8),
    }
    with pytest.raises(error, match=message):
        ops.rotary_embedding(**arguments | changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (3, 34)])
def test_gated_activations(shape, dtype):
    x = torch.randn(shape).to(dtype)
    gate, up = x.tensor_split(2, dim=1)
    assert torch.equal(ops.silu_and_mul(x), F.silu(gate) * up)
    assert torch.equal(ops.gelu_tanh_and_mul(x), F.gelu(gate, approximate="tanh") * up)
    wide = torch.cat((x, x), dim=1)[:, : shape[1]]
    assert torch.equal(ops.silu_and_mul(wide), ops.silu_and_mul(x))


@pytest.mark.parametrize("op", [ops.silu_and_mul, ops.gelu_tanh_and_mul])
def test_activations_that_do_not_fit(op):
    with pytest.raises(ShapeError, match="x must be"):
        op(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="x must be"):
        op(torch.zeros(2, 3, 4))
    with pytest.raises(DtypeError, match="floating point"):
        op(torch.zeros(2, 4).int())


def test_linear():
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert ops.linear(x[:0], weight).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.zeros(()), torch.zeros(4, 5), None, ShapeError, "x must be"),
        (torch.zeros(2, 5), torch.zeros(5), None, ShapeError, "x must be"),
        (torch.zeros(2, 4), torch.zeros(4, 5), None, ShapeError, "x must be"),
        (torch.zeros(2, 5).half(), torch.zeros(4, 5), None, DtypeError, "x and weight"),
        (torch.zeros(2, 5).int(), torch.zeros(4, 5).int(), None, DtypeError, "x and weight"),
        (torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(5), ShapeError, "bias must be .4., got .5."),
        (torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(4, 1), ShapeError, "bias must be"),
        (torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(4).half(), DtypeError, "x and bias"),
    ],
)
def test_linear_that_does_not_fit(x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        ops.linear(x, weight, bias)
