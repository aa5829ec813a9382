# SPDX-License-Identifier: Apache-2.0
"""The rotation against Hugging Face's, and the write to the cache against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from wavetrain_kernels import ops
from wavetrain_kernels.errors import DtypeError, ShapeError
from wavetrain_kernels.reference.kv_cache import dequantize_heads, quantize_heads

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_BLOCKS, BLOCK_SIZE = 9, 4
SLOTS = [30, 5, 0, 17, 6]
POSITIONS = [7, 0, 3, 3, 31]


def cos_sin_cache(max_position: int, rotary_dim: int) -> torch.Tensor:
    inverse = 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angles = torch.arange(max_position).float()[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def make_caches(num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches full of NaN: whatever is not written stays so."""
    shape = (NUM_BLOCKS, num_heads, BLOCK_SIZE, head_dim)
    return torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated query and key, the latter read back from a cache."""
    caches = make_caches(key.shape[1], key.shape[2], key.dtype)
    slots = torch.arange(key.shape[0])
    rotated = ops.rotate_and_cache(query, key, key, positions, table, ops.KVCache(*caches), slots)
    written = caches[0].transpose(1, 2).flatten(0, 1)[: key.shape[0]]
    return rotated, written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("head_dim", [2, 16, 24, 64, 80])
@pytest.mark.parametrize("position_dtype", [torch.int64, torch.int32])
def test_the_rotation_is_hugging_face(num_tokens, head_dim, dtype, position_dtype):
    fused = torch.randn(num_tokens, 9, head_dim).to(dtype)
    query, key, value = fused[:, :5], fused[:, 5:7], fused[:, 7:]
    positions = torch.tensor(POSITIONS[:num_tokens], dtype=position_dtype)
    slots = torch.tensor(SLOTS[:num_tokens], dtype=torch.int64)
    table = cos_sin_cache(32, head_dim).to(dtype)
    cos, sin = torch.cat((table, table), dim=-1)[positions.long()].unbind(1)
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cos, sin)
    key_cache, value_cache = make_caches(2, head_dim, dtype)
    before = fused.clone()
    rotated = ops.rotate_and_cache(query, key, value, positions, table, ops.KVCache(key_cache, value_cache), slots)
    assert rotated.is_contiguous()
    torch.testing.assert_close(rotated, expected_query, atol=1e-6, rtol=1e-6)
    assert torch.equal(fused, before)
    for token, slot in enumerate(slots.tolist()):
        where = (slot // BLOCK_SIZE, slice(None), slot % BLOCK_SIZE)
        torch.testing.assert_close(key_cache[where], expected_key[token], atol=1e-6, rtol=1e-6)
        assert torch.equal(value_cache[where], value[token])
    for cache in (key_cache, value_cache):
        assert (~cache.isnan()).sum() == num_tokens * 2 * head_dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_the_head(dtype):
    query, key = torch.randn(3, 2, 48).to(dtype), torch.randn(3, 1, 48).to(dtype)
    table, positions = cos_sin_cache(8, 24).to(dtype), torch.tensor([1, 2, 7])
    rotated = rotate(query, key, positions, table)
    part = rotate(query[..., :24], key[..., :24], positions, table)
    for result, expected, x in zip(rotated, part, (query, key), strict=True):
        assert torch.equal(result[..., :24], expected)
        assert torch.equal(result[..., 24:], x[..., 24:])


def test_computes_in_the_wider_dtype():
    query, key = torch.randn(2, 3, 1, 40).bfloat16()
    table, positions = cos_sin_cache(8, 40), torch.tensor([1, 2, 7])
    for result, wide in zip(
        rotate(query, key, positions, table), rotate(query.float(), key.float(), positions, table), strict=True
    ):
        assert torch.equal(result, wide.bfloat16())


def test_inputs_that_lie_apart():
    query, key, value = (torch.randn(3, 16, heads).transpose(1, 2) for heads in (4, 2, 2))
    table, positions, slots = cos_sin_cache(8, 16), torch.tensor([1, 0, 2, 0, 7, 0])[::2], torch.tensor([2, 9, 1])
    caches, expected = make_caches(2, 16), make_caches(2, 16)
    rotated = ops.rotate_and_cache(query, key, value, positions, table, ops.KVCache(*caches), slots)
    together = [x.contiguous() for x in (query, key, value, positions)]
    assert torch.equal(rotated, ops.rotate_and_cache(*together, table, ops.KVCache(*expected), slots))
    for cache, other in zip(caches, expected, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), other.nan_to_num(7.0))


def test_skipped_slots_write_nothing():
    caches = make_caches(2, 8)
    query, key, value = torch.randn(3, 3, 2, 8)
    table, positions = cos_sin_cache(8, 8), torch.tensor([4, 0, 5])
    rotated = ops.rotate_and_cache(query, key, value, positions, table, ops.KVCache(*caches), torch.tensor([-1, 5, -1]))
    assert torch.equal(rotated, rotate(query, key, positions, table)[0])
    for cache, written in zip(caches, (key, value), strict=True):
        assert torch.equal(cache[1, :, 1], written[1])  # at position 0 nothing turns
        assert cache.isnan().sum() == cache.numel() - written[1].numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 8), (80, 80), (33, 32), (128, 128)])
def test_norms_come_before_the_rotation(dtype, head_dim, rotary_dim):
    fused = (3 * torch.randn(5, 9, head_dim)).to(dtype)
    query, key, value = fused[:, :5], fused[:, 5:7], fused[:, 7:]
    positions, slots = torch.tensor(POSITIONS), torch.tensor([30, 5, -1, 17, 6])
    table = cos_sin_cache(32, rotary_dim).to(dtype)
    query_norm, key_norm = torch.randn(2, head_dim).to(dtype)
    caches, expected = make_caches(2, head_dim, dtype), make_caches(2, head_dim, dtype)
    norms = {"query_norm": query_norm, "key_norm": key_norm, "eps": 1e-3}
    rotated = ops.rotate_and_cache(query, key, value, positions, table, ops.KVCache(*caches), slots, **norms)
    normalized = ops.rms_norm(query, query_norm, 1e-3), ops.rms_norm(key, key_norm, 1e-3)
    assert torch.equal(
        rotated, ops.rotate_and_cache(*normalized, value, positions, table, ops.KVCache(*expected), slots)
    )
    for cache, other in zip(caches, expected, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), other.nan_to_num(7.0))


QUANTIZED = [torch.int8, torch.float8_e4m3fn]


def quantized_cache(num_heads: int, head_dim: int, dtype: torch.dtype) -> ops.KVCache:
    """Zero codes, which differ from what is written, and scales of NaN."""
    cache = ops.allocate_kv_cache((NUM_BLOCKS, num_heads, BLOCK_SIZE, head_dim), dtype, torch.device("cpu"))
    assert cache.key_scale is not None
    assert cache.value_scale is not None
    cache.key_scale.fill_(float("nan"))
    cache.value_scale.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 16, 24, 64, 80, 130])
@pytest.mark.parametrize("has_norm", [False, True])
def test_codes_and_scales_of_what_is_cached_otherwise(head_dim, has_norm, dtype, cache_dtype):
    """To the bit, in every kernel set; slots that nobody wrote to keep what they had."""
    fused = (3 * torch.randn(5, 9, head_dim)).to(dtype)
    fused[1, 5:] *= 1e-4
    fused[2, 6] = 0.0
    fused[3, 7] = torch.linspace(-1, 1, head_dim).to(dtype) ** 9  # most of it subnormal in e4m3
    query, key, value = fused[:, :5], fused[:, 5:7], fused[:, 7:]
    positions, slots = torch.tensor(POSITIONS), torch.tensor([30, 5, -1, 17, 6])
    table = cos_sin_cache(32, head_dim).to(dtype)
    norm = torch.randn(head_dim).to(dtype) if has_norm else None
    options = {"query_norm": norm, "key_norm": norm, "eps": 1e-3}
    plain, cache = ops.KVCache(*make_caches(2, head_dim, dtype)), quantized_cache(2, head_dim, cache_dtype)
    expected = ops.rotate_and_cache(query, key, value, positions, table, plain, slots, **options)
    assert torch.equal(ops.rotate_and_cache(query, key, value, positions, table, cache, slots, **options), expected)
    held = [(plain.key, cache.key, cache.key_scale), (plain.value, cache.value, cache.value_scale)]
    for heads, codes, scales in held:
        is_written = ~heads[..., 0].isnan()
        assert is_written.sum() == 4 * 2
        expected_codes, expected_scales = quantize_heads(heads[is_written], cache_dtype)
        assert torch.equal(codes.view(torch.uint8)[is_written], expected_codes.view(torch.uint8))
        assert torch.equal(scales[is_written], expected_scales)
        assert (codes.view(torch.uint8)[~is_written] == 0).all()
        assert scales[~is_written].isnan().all()


@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_head_that_is_not_finite_has_no_scale(place, bad, cache_dtype):
    query, key, value = torch.randn(3, 2, 2, 40)
    value[1, 0, place] = bad
    cache, slots = quantized_cache(2, 40, cache_dtype), torch.tensor([4, 5])
    ops.rotate_and_cache(query, key, value, torch.tensor([0, 1]), cos_sin_cache(8, 40), cache, slots)
    assert cache.value_scale is not None
    assert cache.value_scale[1, :, :2].isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(("cache_dtype", "largest_error"), [(torch.int8, 0.51 / 126), (torch.float8_e4m3fn, 1 / 16)])
def test_codes_are_as_near_as_they_can_be(cache_dtype, largest_error):
    """int8: half a step of the largest magnitude; e4m3: half of the last of three bits of a number's own."""
    heads = torch.randn(200, 64) * torch.logspace(-26, 30, 200)[:, None]
    codes, scales = quantize_heads(heads, cache_dtype)
    error = (dequantize_heads(codes, scales, torch.float32) - heads).abs()
    largest = heads.abs().amax(-1, keepdim=True)
    # The least step of e4m3 is 2^-9, of at most 448.
    of_number = torch.maximum(heads.abs() * largest_error, largest * (0.51 * 2**-9 / 444))
    assert (error <= (largest * largest_error if cache_dtype is torch.int8 else of_number)).all()


def test_many_tokens_in_any_order():
    """Enough for several threads."""
    num_tokens = 300
    query, key, value = torch.randn(num_tokens, 8, 64), torch.randn(num_tokens, 2, 64), torch.randn(num_tokens, 2, 64)
    table, positions = cos_sin_cache(num_tokens, 64), torch.randperm(num_tokens)
    shape = (num_tokens // BLOCK_SIZE, 2, BLOCK_SIZE, 64)
    caches = torch.zeros(shape), torch.zeros(shape)
    slots = torch.randperm(num_tokens)
    rotated = ops.rotate_and_cache(query, key, value, positions, table, ops.KVCache(*caches), slots)
    cos, sin = torch.cat((table, table), dim=-1)[positions].unbind(1)
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close(rotated, expected_query, atol=1e-6, rtol=1e-6)
    for cache, expected in zip(caches, (expected_key, value), strict=True):
        written = cache.transpose(1, 2).flatten(0, 1)[slots]
        torch.testing.assert_close(written, expected, atol=1e-6, rtol=1e-6)


def cache_of(shape: tuple, value_shape: tuple | None = None, dtype: torch.dtype = torch.float32) -> ops.KVCache:
    return ops.KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(value_shape or shape, dtype=dtype))


GOOD = {
    "query": torch.zeros(3, 4, 16),
    "key": torch.zeros(3, 2, 16),
    "value": torch.zeros(3, 2, 16),
    "positions": torch.zeros(3).long(),
    "cos_sin_cache": torch.zeros(8, 2, 8),
    "cache": cache_of((5, 2, 4, 16)),
    "slot_mapping": torch.tensor([0, 1, -1]),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(3, 16)}, ShapeError, "query must be"),
        ({"key": torch.zeros(3, 16)}, ShapeError, "query must be"),
        ({"key": torch.zeros(2, 2, 16)}, ShapeError, "query must be"),
        ({"key": torch.zeros(3, 2, 8)}, ShapeError, "query must be"),
        ({"value": torch.zeros(3, 1, 16)}, ShapeError, "key and value must be"),
        ({"positions": torch.zeros(2).long()}, ShapeError, "positions must be"),
        ({"positions": torch.zeros(3, 1).long()}, ShapeError, "positions must be"),
        ({"cos_sin_cache": torch.zeros(8, 16)}, ShapeError, "cos_sin_cache must be"),
        ({"cos_sin_cache": torch.zeros(8, 1, 8)}, ShapeError, "cos_sin_cache must be"),
        ({"cos_sin_cache": torch.zeros(8, 2, 9)}, ShapeError, "cos_sin_cache must be"),
        ({"slot_mapping": torch.zeros(2).long()}, ShapeError, "slot_mapping must be .T. = .3."),
        ({"key": torch.zeros(3, 1, 16), "value": torch.zeros(3, 1, 16)}, ShapeError, "1 heads, the cache 2"),
        ({"cache": cache_of((5, 2, 16))}, ShapeError, "must be .num_blocks, Hkv, block_size, D"),
        ({"cache": cache_of((5, 2, 4, 16), (4, 2, 4, 16))}, ShapeError, "must be .num_blocks, Hkv, block_size, D"),
        ({"cache": cache_of((5, 2, 8, 8))}, ShapeError, "the cache holds heads of 8 dimensions, got 16"),
        ({"cache": ops.KVCache(*torch.zeros(2, 5, 2, 16, 4).mT)}, ShapeError, "must be contiguous"),
        ({"query": torch.zeros(3, 4, 16).int()}, DtypeError, "query, key and value"),
        ({"key": torch.zeros(3, 2, 16).half()}, DtypeError, "query, key and value"),
        ({"value": torch.zeros(3, 2, 16).half()}, DtypeError, "query, key and value"),
        ({"positions": torch.zeros(3)}, DtypeError, "positions must be int64 or int32"),
        ({"cos_sin_cache": torch.zeros(8, 2, 8).int()}, DtypeError, "cos_sin_cache must be floating"),
        ({"slot_mapping": torch.zeros(3).int()}, DtypeError, "slot_mapping must be int64"),
        ({"cache": cache_of((5, 2, 4, 16), dtype=torch.float16)}, DtypeError, "cache holds torch.float16 and"),
        ({"cache": cache_of((5, 2, 4, 16), dtype=torch.int8)}, ShapeError, "a cache of torch.int8 has a key_scale"),
        ({"query_norm": torch.zeros(16)}, ShapeError, "query_norm and key_norm go together"),
        ({"key_norm": torch.zeros(16)}, ShapeError, "query_norm and key_norm go together"),
        ({"query_norm": torch.zeros(8), "key_norm": torch.zeros(16)}, ShapeError, "query_norm must be .D. = .16."),
        ({"query_norm": torch.zeros(16), "key_norm": torch.zeros(4, 16)}, ShapeError, "key_norm must be .D. = .16."),
        ({"query_norm": torch.zeros(16).half(), "key_norm": torch.zeros(16)}, DtypeError, "query and query_norm"),
        ({"query_norm": torch.zeros(16), "key_norm": torch.zeros(16).half()}, DtypeError, "query and key_norm"),
    ],
)
def test_arguments_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        ops.rotate_and_cache(**GOOD | changes)
