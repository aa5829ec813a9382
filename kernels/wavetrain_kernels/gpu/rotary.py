# SPDX-License-Identifier: Apache-2.0
"""Norms of the heads, their rotation and the write to the KV cache, in one launch.

A program takes one token and several heads. Every head is loaded as its two rotated halves, and what lies behind them,
so the partner of each element is in the same thread and nothing goes through shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.kv_cache import codes_of, codes_to_write, head_scale, largest_code
from wavetrain_kernels.gpu.launch import TRITON_TYPES, cdiv, fall_back, launch, next_power_of_2
from wavetrain_kernels.kv_cache import LARGEST_CODES, KVCache
from wavetrain_kernels.reference import rotary as reference

# T = tokens, Hq = query heads, Hkv = key-value heads, D = head dimension, R = rotated dimensions.


@dataclass(frozen=True, slots=True)
class RotaryConfig:
    """How a launch is cut into programs: each takes up to `block_heads` heads of one token."""

    block_heads: int
    num_warps: int


def rotary_config(num_heads: int, head_dim: int) -> RotaryConfig:
    """Returns the configuration for a model: 1024 elements a program.

    With two warps a thread has eight elements of each half, one 16-byte load in 16-bit types.
    """
    fitting = max(1024 // next_power_of_2(head_dim), 1)
    return RotaryConfig(min(fitting, next_power_of_2(num_heads)), 2)


@triton.jit
def _load_part(x_ptr, heads, columns, is_there, stride_xh, stride_xd):
    offsets = heads * stride_xh + columns * stride_xd
    return tl.load(x_ptr + offsets, mask=is_there, other=0.0)


@triton.jit
def _scale_part(x, norm_ptr, columns, is_column, rstd):
    """x / rms(x), rounded, times the weight, rounded: as RMS norm is."""
    weight = tl.load(norm_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    return ((x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32) * weight).to(x.dtype)


@triton.jit
def _product(a, b, ROUNDS: tl.constexpr):
    """a * b in float32; rounded to a's type where PyTorch would have computed in that."""
    wide = a.to(tl.float32) * b.to(tl.float32)
    return wide.to(a.dtype).to(tl.float32) if ROUNDS else wide


@triton.jit
def _extent(x):
    """The largest magnitude of each head's elements, [BLOCK_HEADS, 1], and 0, or NaN where one is not finite."""
    wide = x.to(tl.float32)
    return tl.max(tl.abs(wide), axis=1, keep_dims=True), tl.sum(wide * 0.0, axis=1, keep_dims=True)


@triton.jit
def _rotate_heads(
    out_ptr,
    x_ptr,
    norm_ptr,
    cosines_ptr,
    heads,
    is_head,
    eps,
    stride_oh,
    stride_xh,
    stride_xd,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    scale_ptr=None,
    stride_sh=0,
    LARGEST_CODE: tl.constexpr = None,  # type: ignore[assignment]
):
    """Writes heads, [BLOCK_HEADS, 1], of one token to out_ptr: normalized where there is a norm, and rotated.

    With a scale_ptr they are written as codes, and their scales there.
    """
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    is_column = columns < HALF
    cosines = tl.load(cosines_ptr + columns, mask=is_column, other=0.0)
    sines = tl.load(cosines_ptr + HALF + columns, mask=is_column, other=0.0)
    first = _load_part(x_ptr, heads, columns, is_head & is_column, stride_xh, stride_xd)
    second = _load_part(x_ptr, heads, HALF + columns, is_head & is_column, stride_xh, stride_xd)
    rest_columns = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    is_rest = rest_columns < HEAD_DIM
    if HEAD_DIM > 2 * HALF:
        rest = _load_part(x_ptr, heads, rest_columns, is_head & is_rest, stride_xh, stride_xd)
    if norm_ptr is not None:
        squares = tl.sum(first.to(tl.float32) * first.to(tl.float32), axis=1, keep_dims=True)
        squares += tl.sum(second.to(tl.float32) * second.to(tl.float32), axis=1, keep_dims=True)
        if HEAD_DIM > 2 * HALF:
            squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1, keep_dims=True)
        rstd = tl.rsqrt(squares / HEAD_DIM + eps)
        first = _scale_part(first, norm_ptr, columns, is_column, rstd)
        second = _scale_part(second, norm_ptr, HALF + columns, is_column, rstd)
        if HEAD_DIM > 2 * HALF:
            rest = _scale_part(rest, norm_ptr, rest_columns, is_rest, rstd)
    turned_first = _product(first, cosines, ROUNDS) - _product(second, sines, ROUNDS)
    turned_second = _product(second, cosines, ROUNDS) + _product(first, sines, ROUNDS)
    first, second = turned_first.to(first.dtype), turned_second.to(second.dtype)
    if scale_ptr is not None:
        largest, poison = _extent(first)
        largest_second, poison_second = _extent(second)
        largest, poison = tl.maximum(largest, largest_second), poison + poison_second
        if HEAD_DIM > 2 * HALF:
            largest_rest, poison_rest = _extent(rest)
            largest, poison = tl.maximum(largest, largest_rest), poison + poison_rest
        scale = head_scale(largest, poison, LARGEST_CODE)
        tl.store(scale_ptr + heads * stride_sh, scale.to(scale_ptr.dtype.element_ty), mask=is_head)
        first, second = codes_of(first, scale, LARGEST_CODE), codes_of(second, scale, LARGEST_CODE)
        if HEAD_DIM > 2 * HALF:
            rest = codes_of(rest, scale, LARGEST_CODE)
    out_ptrs = out_ptr + heads * stride_oh + columns
    tl.store(out_ptrs, first, mask=is_head & is_column)
    tl.store(out_ptrs + HALF, second, mask=is_head & is_column)
    if HEAD_DIM > 2 * HALF:
        tl.store(out_ptr + heads * stride_oh + rest_columns, rest, mask=is_head & is_rest)


@triton.jit(do_not_specialize=["eps"], do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"])
def _rotate_and_cache_kernel(
    query_out_ptr,  # [T, Hq, D], contiguous
    query_ptr,  # [T, Hq, D]
    key_ptr,  # [T, Hkv, D]
    value_ptr,  # [T, Hkv, D]
    positions_ptr,  # [T]
    cos_sin_ptr,  # [max_position, 2, HALF]
    key_cache_ptr,  # [num_blocks, Hkv, BLOCK_SIZE, D]
    value_cache_ptr,  # [num_blocks, Hkv, BLOCK_SIZE, D]
    key_scale_ptr,  # [num_blocks, Hkv, BLOCK_SIZE] of a quantized cache, or None
    value_scale_ptr,
    slot_mapping_ptr,  # [T]; -1: nowhere
    query_norm_ptr,  # [D] or None
    key_norm_ptr,  # [D] or None
    eps,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    NUM_HEADS: tl.constexpr,  # Hq
    NUM_KV_HEADS: tl.constexpr,  # Hkv
    HEAD_DIM: tl.constexpr,  # D
    HALF: tl.constexpr,  # R / 2
    BLOCK_SIZE: tl.constexpr,
    ROUNDS: tl.constexpr,
    LARGEST_CODE: tl.constexpr,  # of a quantized cache, or None
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    num_query_programs: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    part = tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cosines_ptr = cos_sin_ptr + position * (2 * HALF)
    lanes = tl.arange(0, BLOCK_HEADS)[:, None]
    if part < num_query_programs:
        heads = part * BLOCK_HEADS + lanes
        _rotate_heads(
            query_out_ptr + token * (NUM_HEADS * HEAD_DIM),
            query_ptr + token * stride_qt,
            query_norm_ptr,
            cosines_ptr,
            heads,
            heads < NUM_HEADS,
            eps,
            HEAD_DIM,
            stride_qh,
            stride_qd,
            HEAD_DIM,
            HALF,
            ROUNDS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        slot = tl.load(slot_mapping_ptr + token)
        heads = (part - num_query_programs) * BLOCK_HEADS + lanes
        is_head = (heads < NUM_KV_HEADS) & (slot >= 0)
        # Row `slot % BLOCK_SIZE` of head 0 in the slot's block; the next head's is BLOCK_SIZE rows further.
        first_row = slot // BLOCK_SIZE * NUM_KV_HEADS * BLOCK_SIZE + slot % BLOCK_SIZE
        row = first_row * HEAD_DIM
        _rotate_heads(
            key_cache_ptr + row,
            key_ptr + token * stride_kt,
            key_norm_ptr,
            cosines_ptr,
            heads,
            is_head,
            eps,
            BLOCK_SIZE * HEAD_DIM,
            stride_kh,
            stride_kd,
            HEAD_DIM,
            HALF,
            ROUNDS,
            BLOCK_HALF,
            BLOCK_REST,
            None if key_scale_ptr is None else key_scale_ptr + first_row,
            BLOCK_SIZE,
            LARGEST_CODE,
        )
        columns = tl.arange(0, BLOCK_DIM)[None, :]
        is_there = is_head & (columns < HEAD_DIM)
        value = _load_part(value_ptr + token * stride_vt, heads, columns, is_there, stride_vh, stride_vd)
        if value_scale_ptr is not None:
            largest, poison = _extent(value)
            scale = head_scale(largest, poison, LARGEST_CODE)
            scale_ptrs = value_scale_ptr + first_row + heads * BLOCK_SIZE
            tl.store(scale_ptrs, scale.to(value_scale_ptr.dtype.element_ty), mask=is_head)
            value = codes_of(value, scale, LARGEST_CODE)
        tl.store(value_cache_ptr + row + heads * (BLOCK_SIZE * HEAD_DIM) + columns, value, mask=is_there)


def rotate_and_cache(
    query_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: KVCache,
    slot_mapping: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> None:
    """query_out = rotated query; the cache gets the rotated key, and the value. Norms come before the rotation."""
    if query.dtype not in TRITON_TYPES or cos_sin_cache.dtype not in TRITON_TYPES:
        fall_back("rotate_and_cache", f"{query.dtype} heads and a {cos_sin_cache.dtype} table")
        inputs = (query, key, value, positions, cos_sin_cache)
        reference.rotate_and_cache(query_out, *inputs, cache, slot_mapping, query_norm, key_norm, eps)
        return
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, half = key.shape[1], cos_sin_cache.shape[2]
    config = rotary_config(num_heads, head_dim)
    parts = cdiv(num_heads, config.block_heads) + cdiv(num_kv_heads, config.block_heads)
    launch(
        _rotate_and_cache_kernel,
        (num_tokens, parts),
        query_out,
        query,
        key,
        value,
        positions.contiguous(),
        cos_sin_cache.contiguous(),
        *codes_to_write(cache),
        cache.key_scale,
        cache.value_scale,
        slot_mapping.contiguous(),
        None if query_norm is None else query_norm.contiguous(),
        None if key_norm is None else key_norm.contiguous(),
        eps,
        *_strides(query),
        *_strides(key),
        *_strides(value),
        **_constexprs(num_heads, num_kv_heads, head_dim, half, cache.block_size, config),
        ROUNDS=query.dtype == cos_sin_cache.dtype,
        LARGEST_CODE=largest_code(cache),
        num_warps=config.num_warps,
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of token, head and element; that of a dimension of size 1 means nothing, and must make no variant."""
    token, head, element = x.stride()
    return (token if x.shape[0] > 1 else 16 * element, head if x.shape[1] > 1 else 16 * element, element)


def _constexprs(
    num_heads: int, num_kv_heads: int, head_dim: int, half: int, block_size: int, config: RotaryConfig
) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "BLOCK_SIZE": block_size,
        "BLOCK_HEADS": config.block_heads,
        "BLOCK_HALF": next_power_of_2(half),
        "BLOCK_REST": next_power_of_2(max(head_dim - 2 * half, 1)),
        "BLOCK_DIM": next_power_of_2(head_dim),
    }


def aot_cases() -> Iterator[AotCase]:
    """Every head dimension, whole and in part, with norms and without; grouped and single KV heads; all types."""
    for head_dim, rotary_dim in ((64, 64), (64, 32), (80, 80), (80, 32), (96, 96), (128, 128), (128, 64), (256, 256)):
        for has_norm in (False, True):
            yield _aot_case("bf16", "bf16", 32, 8, head_dim, rotary_dim, 16, has_norm)
    yield _aot_case("bf16", "bf16", 14, 2, 64, 64, 32, False)
    yield _aot_case("bf16", "fp32", 32, 8, 128, 128, 32, True)
    yield _aot_case("fp16", "fp16", 32, 8, 128, 128, 16, True)
    yield _aot_case("fp32", "fp32", 12, 4, 64, 64, 16, False)
    yield _aot_case("bf16", "bf16", 64, 1, 128, 128, 16, False)
    for codes in ("i8", "u8"):
        for head_dim, rotary_dim in ((80, 32), (128, 128)):
            yield _aot_case("bf16", "bf16", 32, 8, head_dim, rotary_dim, 16, head_dim == 128, codes)
        yield _aot_case("fp16", "fp32", 32, 8, 128, 128, 32, False, codes)


# What a quantized cache is to this kernel.
_LARGEST_CODES = {"i8": LARGEST_CODES[torch.int8], "u8": LARGEST_CODES[torch.float8_e4m3fn]}


def _aot_case(
    dtype: str,
    table_dtype: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    block_size: int,
    has_norm: bool,
    codes: str | None = None,
) -> AotCase:
    config = rotary_config(num_heads, head_dim)
    signature = dict.fromkeys(("query_out_ptr", "query_ptr", "key_ptr", "value_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), f"*{codes or dtype}")
    signature |= {"positions_ptr": "*i64", "slot_mapping_ptr": "*i64", "cos_sin_ptr": f"*{table_dtype}", "eps": "fp32"}
    for name in "qkv":
        signature |= {f"stride_{name}t": "i32:16", f"stride_{name}h": "i32:16", f"stride_{name}d": "i32:1"}
    constexprs: dict[str, object] = {
        **_constexprs(num_heads, num_kv_heads, head_dim, rotary_dim // 2, block_size, config),
        "ROUNDS": dtype == table_dtype,
        "LARGEST_CODE": None if codes is None else _LARGEST_CODES[codes],
    }
    for name in ("key_scale_ptr", "value_scale_ptr"):
        if codes is None:
            constexprs[name] = None
        else:
            signature[name] = "*bf16"
    for name in ("query_norm_ptr", "key_norm_ptr"):
        if has_norm:
            signature[name] = f"*{dtype}"
        else:
            constexprs[name] = None
    name = (
        f"rotate_and_cache/{dtype}-{table_dtype}/{num_heads}-{num_kv_heads}x{head_dim}-{rotary_dim}/block{block_size}"
    )
    name += ("/norm" if has_norm else "") + (f"/{codes}" if codes else "")
    return AotCase(name, _rotate_and_cache_kernel, signature, constexprs, config.num_warps, 1, is_decode=True)
