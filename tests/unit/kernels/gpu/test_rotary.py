# SPDX-License-Identifier: Apache-2.0
"""The GPU's norm, rotation and cache write, in one launch, against the reference."""

from __future__ import annotations

import logging

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.gpu.kv_cache import codes_of
from wavetrain_kernels.gpu.launch import fall_back
from wavetrain_kernels.gpu.rotary import rotary_config
from wavetrain_kernels.kv_cache import LARGEST_CODES, KVCache
from wavetrain_kernels.reference.kernels import REFERENCE
from wavetrain_kernels.reference.kv_cache import dequantize_heads

NUM_BLOCKS = 7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def cos_sin_table(rotary_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    inverse = 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2).float() / max(rotary_dim, 1))
    angles = torch.arange(64).float()[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device, dtype)


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> KVCache:
    """NaN, or codes of 1 with scales of NaN."""
    if dtype not in LARGEST_CODES:
        return KVCache(*(torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2)))
    held = [torch.ones(shape, device=device).to(dtype) for _ in range(2)]
    return KVCache(*held, *(torch.full(shape[:3], float("nan"), device=device).bfloat16() for _ in range(2)))


def contents(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as what they stand for."""
    if cache.key_scale is None or cache.value_scale is None:
        return cache.key, cache.value
    return tuple(
        dequantize_heads(codes, scale, torch.float32)
        for codes, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
    )


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    codes: torch.dtype | None = None,
) -> None:
    """Runs both sets over caches full of NaN, which must stay where nothing is written."""
    device, dtype = query.device, query.dtype
    if positions is None:
        positions = torch.randint(64, slots.shape, device=device)
    shape = (NUM_BLOCKS, key.shape[1], block_size, key.shape[2])
    results = []
    for kernels in (GPU, REFERENCE):
        out = torch.empty(query.shape, dtype=dtype, device=device)
        cache = empty_cache(shape, dtype if codes is None else codes, device)
        tensors = (out, query, key, value, positions, table, cache, slots)
        kernels.rotate_and_cache(*tensors, *(norms or (None, None)), 1e-3)
        results.append((out, *contents(cache)))
    tolerance = TOLERANCE[dtype]
    if codes is torch.float8_e4m3fn:
        tolerance = max(tolerance, 0.13)  # a rotation that differs in its last bit may be rounded the other way
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    if codes is None:  # values are copied
        assert torch.equal(results[0][2].nan_to_num(7.0), results[1][2].nan_to_num(7.0))


def slots_for(num_tokens: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Scattered slots, each third one nowhere."""
    slots = torch.randperm(NUM_BLOCKS * block_size)[:num_tokens]
    slots[2::3] = -1
    return slots.to(device)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 32), (80, 32), (128, 6), (16, 0), (2, 2), (33, 30)],
)
def test_every_head_dimension(head_dim, rotary_dim, has_norm, dtype, device):
    fused = torch.randn(5, 9, head_dim, device=device).to(dtype)
    norms = torch.randn(2, head_dim, device=device).to(dtype).unbind() if has_norm else None
    table = cos_sin_table(rotary_dim, dtype, device)
    check(fused[:, :5], fused[:, 5:7], fused[:, 7:], table, slots_for(5, 16, device), 16, norms)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (14, 2), (12, 12), (32, 8), (71, 1)])
@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_every_number_of_heads(num_tokens, num_heads, num_kv_heads, dtype, device):
    query = torch.randn(num_tokens, num_heads, 32, device=device).to(dtype)
    key, value = torch.randn(2, num_tokens, num_kv_heads, 32, device=device).to(dtype)
    check(query, key, value, cos_sin_table(32, dtype, device), slots_for(num_tokens, 4, device), 4)


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_table_in_float32(block_size, has_norm, dtype, device):
    query = torch.randn(4, 6, 64, device=device).to(dtype)
    key, value = torch.randn(2, 4, 2, 64, device=device).to(dtype)
    norms = torch.randn(2, 64, device=device).to(dtype).unbind() if has_norm else None
    check(
        query, key, value, cos_sin_table(64, torch.float32, device), slots_for(4, block_size, device), block_size, norms
    )


def test_inputs_that_lie_apart(dtype, device):
    query, key, value = (torch.randn(6, 32, heads, device=device).to(dtype).transpose(1, 2) for heads in (4, 2, 2))
    positions = torch.arange(12, device=device)[::2]
    table = torch.cat([cos_sin_table(32, dtype, device)] * 2, dim=2)[:, :, :16]
    slots = torch.arange(12, device=device)[1::2]
    check(query, key, value, table, slots, 4, positions=positions)


def test_positions_of_32_bits(device):
    query = torch.randn(3, 2, 16, device=device)
    positions = torch.tensor([7, 0, 63], dtype=torch.int32, device=device)
    check(
        query, query, query, cos_sin_table(16, torch.float32, device), slots_for(3, 4, device), 4, positions=positions
    )


def test_rows_that_only_fill_up_a_graph_write_nothing(dtype, device):
    query = torch.randn(8, 4, 64, device=device).to(dtype)
    slots = torch.full((8,), -1, device=device)
    check(
        query,
        query[:, :2],
        query[:, 2:],
        cos_sin_table(64, dtype, device),
        slots,
        16,
        positions=torch.zeros_like(slots),
    )


def test_inputs_are_left_alone(dtype, device):
    fused = torch.randn(5, 6, 32, device=device).to(dtype)
    before = fused.clone()
    norms = torch.randn(2, 32, device=device).to(dtype).unbind()
    check(
        fused[:, :4], fused[:, 4:5], fused[:, 5:], cos_sin_table(32, dtype, device), slots_for(5, 4, device), 4, norms
    )
    assert torch.equal(fused, before)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.integers(2, 40),
    share=st.floats(0, 1),
    block_size=st.integers(1, 9),
    has_norm=st.booleans(),
)
def test_any_shape(num_tokens, num_kv_heads, group, head_dim, share, block_size, has_norm, device):
    query = torch.randn(num_tokens, num_kv_heads * group, head_dim, device=device)
    key, value = torch.randn(2, num_tokens, num_kv_heads, head_dim, device=device)
    rotary_dim = 2 * int(share * (head_dim // 2))
    norms = torch.randn(2, head_dim, device=device).unbind() if has_norm else None
    slots = slots_for(num_tokens, block_size, device)
    check(query, key, value, cos_sin_table(rotary_dim, torch.float32, device), slots, block_size, norms)


def test_what_is_not_served_goes_to_the_reference_and_is_said_once(device, caplog):
    fall_back.cache_clear()
    query = torch.randn(3, 2, 16, device=device).double()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = torch.empty_like(query)
            cache = KVCache(*torch.zeros(2, 3, 2, 4, 16, dtype=query.dtype, device=device))
            slots, table = torch.arange(3, device=device), cos_sin_table(16, torch.float64, device)
            GPU.rotate_and_cache(out, query, query, query, slots, table, cache, slots, None, None, 0.0)
    assert torch.equal(out[0], query[0])  # nothing turns at position 0
    assert [record.getMessage() for record in caplog.records] == [
        "rotate_and_cache: no GPU kernel for torch.float64 heads and a torch.float64 table, the reference answers"
    ]


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (16, 0), (33, 30)])
def test_codes_and_their_scales(head_dim, rotary_dim, has_norm, codes, dtype, device):
    fused = torch.randn(5, 9, head_dim, device=device).to(dtype)
    fused[1, 5:] *= 1e-3
    fused[0, 8] = 0
    norms = torch.randn(2, head_dim, device=device).to(dtype).unbind() if has_norm else None
    table, slots = cos_sin_table(rotary_dim, dtype, device), slots_for(5, 16, device)
    check(fused[:, :5], fused[:, 5:7], fused[:, 7:], table, slots, 16, norms, codes=codes)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_has_no_scale(bad, device):
    query, key, value = torch.randn(3, 2, 2, 32, device=device).unbind()
    key[1, 0, 20] = value[0, 1, 31] = bad
    cache = empty_cache((1, 2, 4, 32), torch.int8, device)
    slots = torch.arange(2, device=device)
    tensors = (
        torch.empty_like(query),
        query,
        key,
        value,
        slots,
        cos_sin_table(32, torch.float32, device),
        cache,
        slots,
    )
    GPU.rotate_and_cache(*tensors, None, None, 0.0)
    assert cache.key_scale is not None
    assert cache.value_scale is not None
    assert cache.key_scale[0, :, :2].isnan().tolist() == [[False, True], [False, False]]
    assert cache.value_scale[0, :, :2].isnan().tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("largest_code", [127.0, 448.0])
def test_every_code_is_rounded_as_pytorch_rounds(largest_code, device):
    """Magnitudes from below the least subnormal number to the largest, ties among them."""
    dtype = {code: dtype for dtype, code in LARGEST_CODES.items()}[largest_code]
    numbers = torch.cat([torch.logspace(-14, 9, 3000, base=2.0), torch.arange(0, 128, 0.0625), torch.zeros(1)])
    if dtype is not torch.int8:  # each number of e4m3, and each one halfway between two
        exact = torch.arange(0x7F, dtype=torch.uint8).view(dtype).float()
        numbers = torch.cat([numbers, exact, (exact[1:] + exact[:-1]) / 2])
    numbers = torch.cat([numbers, -numbers]).clamp(-largest_code, largest_code).to(device)
    out = torch.empty(numbers.shape, dtype=torch.int8 if dtype is torch.int8 else torch.uint8, device=device)
    _code_kernel[(1,)](out, numbers, numbers.shape[0], 32768, largest_code)
    expected = numbers.round().to(dtype) if dtype is torch.int8 else numbers.to(dtype)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@triton.jit
def _code_kernel(out_ptr, x_ptr, size, BLOCK: tl.constexpr, LARGEST_CODE: tl.constexpr):  # noqa: N803
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < size, other=0.0)
    tl.store(out_ptr + places, codes_of(x, 1.0, LARGEST_CODE), mask=places < size)


def test_configurations_fill_their_warps():
    for num_heads, head_dim in ((32, 128), (14, 64), (1, 16), (64, 256), (8, 1024)):
        config = rotary_config(num_heads, head_dim)
        assert config.block_heads & (config.block_heads - 1) == 0
        assert config.block_heads < 2 * num_heads
