# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit rows with weights of 4 or 8 bits: out = x @ weight.T, the weight widened in registers.

Of few rows, reading the weight is all the time there is, so what counts is bytes in flight and instructions a value:
some 2.4 for 4-bit values, where an H200 has time for three.
- The product is turned round, out.T = weight @ x.T: the widened weight is the left operand, which Hopper's warp-group
  instructions take from registers (as Machete and Marlin do). It never passes through shared memory once widened.
- Sums of one group are scaled, not the weights: 16 rows have eight times fewer sums than a group of 128 has weights.
- Programs share the inputs of a tile where there are too few tiles. Each leaves its sums; the last to arrive adds all
  of them by rank, so a result never depends on which was last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavetrain_kernels.gpu.activation import activated
from wavetrain_kernels.gpu.aot_case import AotCase
from wavetrain_kernels.gpu.launch import A100, H200, DeviceTraits, cdiv, launch
from wavetrain_kernels.gpu.quantized_packing import PackedQuantized, QuantizedShape
from wavetrain_kernels.gpu.weight_only_config import WeightOnlyConfig, chosen_config, weight_only_config
from wavetrain_kernels.gpu.widened_weight import widened
from wavetrain_kernels.gpu.workspace import workspace
from wavetrain_kernels.quantized_weight import QuantizationScheme

# T = rows, N = outputs, K = inputs, G = groups of inputs, S = programs that share a tile's inputs.


@triton.jit
def store_tile(
    out_ptr, acc, bias_ptr, tile_n, tokens, num_rows,
    SIZE: tl.constexpr, IS_GATED: tl.constexpr, IS_SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """Writes a tile of sums [N, T] to out [T, N], or its gated half to out [T, N / 2]."""
    dtype = out_ptr.dtype.element_ty
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if IS_GATED:
        half: tl.constexpr = SIZE // 2
        # Rounded where two launches would have been, as all our gates are.
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N // 2, 2, BLOCK_T)), (0, 2, 1)))
        units = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if bias_ptr is not None:
            is_unit = units < half
            gate += tl.load(bias_ptr + units, mask=is_unit, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias_ptr + half + units, mask=is_unit, other=0.0).to(tl.float32)[:, None]
        out = activated(gate.to(dtype), up.to(dtype), IS_SILU)
        out_ptrs = out_ptr + tokens[None, :].to(tl.int64) * half + units[:, None]
        tl.store(out_ptrs, out, mask=(tokens < num_rows)[None, :] & (units < half)[:, None])
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + rows, mask=rows < SIZE, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + tokens[None, :].to(tl.int64) * SIZE + rows[:, None]
        tl.store(out_ptrs, acc.to(dtype), mask=(tokens < num_rows)[None, :] & (rows < SIZE)[:, None])


@triton.jit
def widened_sums(  # noqa: ANN201
    x_ptrs, is_token, word_ptrs, scales_ptr, zeros_ptr, codebook_ptr, order_ptr, known, first, last,
    dtype: tl.constexpr, SIZE: tl.constexpr, IN_FEATURES: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr,
    PLANES: tl.constexpr, TOGETHER: tl.constexpr, VALUES: tl.constexpr, MIDDLE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums [N, T] of products of rows with a weight over its blocks [first, last).

    Args:
        x_ptrs: [PLANE, T] of each token's first inputs; with an order [1, T] of its first one.
        word_ptrs: [N, PLANE / 2] of each output's first words.
        order_ptr: [K] the inputs in the order of the words, or None: as they lie.
        known: [N] the outputs.
    """
    inputs = tl.arange(0, PLANE)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # A group's scales are asked for while the group before it is multiplied.
    scale = tl.load(scales_ptr + (first * (PLANE * PLANES) // GROUP if GROUP else 0) * SIZE + known)
    zero = 0.0
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + known)[:, None].to(dtype)
    for block in range(first, last):
        words = tl.load(word_ptrs + block * (PLANE // 2), eviction_policy="evict_first")
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32) if GROUP else acc
        for i in tl.static_range(PLANES):
            start = block * (PLANE * PLANES) + i * PLANE
            if order_ptr is not None:
                is_input = inputs < IN_FEATURES - start
                columns = tl.load(order_ptr + start + inputs, mask=is_input, other=0)
                x = tl.load(x_ptrs + columns[:, None], mask=is_token[None, :] & is_input[:, None], other=0.0)
            elif IN_FEATURES % (PLANE * PLANES) == 0:
                x = tl.load(x_ptrs + start, mask=is_token[None, :], other=0.0)
            else:
                is_there = is_token[None, :] & (inputs < IN_FEATURES - start)[:, None]
                x = tl.load(x_ptrs + start, mask=is_there, other=0.0)
            if zeros_ptr is not None and GROUP and i % TOGETHER == 0:
                group = tl.minimum(start // GROUP, (IN_FEATURES - 1) // GROUP)
                zero = tl.load(zeros_ptr + group * SIZE + known)[:, None].to(dtype)
            values = widened(
                words, zero, codebook_ptr, dtype, VALUES, MIDDLE, codebook_ptr is not None, zeros_ptr is not None, i,
                BLOCK_N, PLANE,
            )  # fmt: skip
            total = tl.dot(values, x, total)
            if GROUP and (i + 1) % TOGETHER == 0:
                acc += total * scale[:, None]
                total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
                scale = tl.load(
                    scales_ptr + tl.minimum((start + PLANE) // GROUP, (IN_FEATURES - 1) // GROUP) * SIZE + known
                )
        if GROUP == 0:
            acc = total
    if GROUP == 0:
        acc *= scale[:, None]
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _weight_only_kernel(
    out_ptr,  # [T, N], or [T, N / 2] with IS_GATED; contiguous
    x_ptr,  # [T, K]
    words_ptr,  # [N, NUM_BLOCKS * PLANE / 2], contiguous
    scales_ptr,  # [G, N], contiguous
    zeros_ptr,  # [G, N], contiguous, or None
    codebook_ptr,  # [16] or None
    bias_ptr,  # [N] or None
    parts_ptr,  # [tiles, S, BLOCK_T, BLOCK_N]; None without IS_SPLIT
    arrived_ptr,  # [tiles], zeros; None without IS_SPLIT
    num_rows,
    num_splits,
    stride_xt,
    SIZE: tl.constexpr,  # N
    IN_FEATURES: tl.constexpr,  # K
    NUM_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale; 0: all
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    TOGETHER: tl.constexpr,  # stretches whose sums are added up before they are scaled
    VALUES: tl.constexpr,
    MIDDLE: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SILU: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts that are asked for before the first has come
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile_n, tile_t, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end are the last one once more, and not stored: loads without a mask can be asynchronous.
    known = tl.minimum(rows, SIZE - 1)
    tokens, inputs = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, PLANE)
    is_token = tokens < num_rows
    word_ptrs = (
        words_ptr + known[:, None].to(tl.int64) * (NUM_BLOCKS * (PLANE // 2)) + tl.arange(0, PLANE // 2)[None, :]
    )
    x_ptrs = x_ptr + tokens[None, :].to(tl.int64) * stride_xt + inputs[:, None]
    per_split = tl.cdiv(NUM_BLOCKS, num_splits)
    first = split * per_split
    acc = widened_sums(
        x_ptrs, is_token, word_ptrs, scales_ptr, zeros_ptr, codebook_ptr, None, known, first,
        tl.minimum(first + per_split, NUM_BLOCKS), dtype,
        SIZE, IN_FEATURES, GROUP, PLANE, PLANES, TOGETHER, VALUES, MIDDLE, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    if IS_SPLIT:
        tile = tile_t * tl.num_programs(0) + tile_n
        at = tl.arange(0, BLOCK_T)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        parts = parts_ptr + tile.to(tl.int64) * num_splits * (BLOCK_T * BLOCK_N) + at
        tl.store(parts + split * (BLOCK_T * BLOCK_N), acc, mask=is_token[None, :])
        tl.debug_barrier()  # all threads' stores come before the count
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == num_splits - 1:
            acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for begin in range(0, num_splits, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    # Written by other multiprocessors: read past this one's own cache.
                    is_part = is_token[None, :] & (begin + i < num_splits)
                    part = parts + (begin + i) * (BLOCK_T * BLOCK_N)
                    acc += tl.load(part, mask=is_part, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            store_tile(out_ptr, acc, bias_ptr, tile_n, tokens, num_rows, SIZE, IS_GATED, IS_SILU, BLOCK_N, BLOCK_T)
    else:
        store_tile(out_ptr, acc, bias_ptr, tile_n, tokens, num_rows, SIZE, IS_GATED, IS_SILU, BLOCK_N, BLOCK_T)


def weight_only_product(
    out: Tensor, x: Tensor, packed: PackedQuantized, bias: Tensor | None, activation: str | None
) -> None:
    """out [T, N] = x [T, K] @ weight.T + bias, or [T, N / 2] its gated units; x in the order of the packed inputs."""
    num_rows = x.shape[0]
    config = weight_only_config(num_rows, packed.shape, x.device)
    tiles = cdiv(packed.shape.out_features, config.block_n), cdiv(num_rows, config.block_t)
    parts, arrived = None, None
    if config.num_splits > 1:
        num_tiles = tiles[0] * max(tiles[1], 1)
        parts_shape = (num_tiles, config.num_splits, config.block_t, config.block_n)
        parts = workspace("weight_only_parts", parts_shape, torch.float32, x.device)
        arrived = workspace("weight_only_arrived", (num_tiles,), torch.int32, x.device)
    launch(
        _weight_only_kernel,
        (*tiles, config.num_splits),
        out,
        x,
        packed.words,
        packed.scales,
        packed.zeros,
        packed.codebook,
        bias,
        parts,
        arrived,
        num_rows,
        config.num_splits,
        x.stride(0) if num_rows > 1 else x.shape[1],  # that of a single row means nothing, and must make no variant
        **_constexprs(packed.shape, activation, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _constexprs(shape: QuantizedShape, activation: str | None, config: WeightOnlyConfig) -> dict[str, Any]:
    return {
        "SIZE": shape.out_features,
        "IN_FEATURES": shape.in_features,
        "NUM_BLOCKS": shape.num_blocks,
        "GROUP": shape.group_size,
        "PLANE": shape.plane,
        "PLANES": shape.planes,
        "TOGETHER": shape.together,
        "VALUES": shape.values,
        "MIDDLE": shape.middle,
        "IS_GATED": activation is not None,
        "IS_SILU": activation == "silu",
        "IS_SPLIT": config.num_splits > 1,
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "AT_ONCE": 4 if config.block_t <= 64 else 1,  # as many as there are registers for
    }


# Schemes by the names of the field, `z` for zeros; the buckets of rows.
_AOT_SCHEMES: dict[str, tuple[QuantizationScheme, tuple[int, ...]]] = {
    "w4g128": (QuantizationScheme(values="int4", group_size=128), (16, 32, 64, 128)),
    "w4g128z": (QuantizationScheme(values="int4", group_size=128), (16, 128)),
    "w4g64z": (QuantizationScheme(values="int4", group_size=64), (16,)),
    "w4g32": (QuantizationScheme(values="int4", group_size=32), (16, 64)),
    "w4": (QuantizationScheme(values="int4", group_size=1 << 20), (16,)),
    "w8": (QuantizationScheme(values="int8", group_size=1 << 20), (16, 32, 64, 128)),
    "w8g128z": (QuantizationScheme(values="int8", group_size=128), (32, 128)),
    "w8g16": (QuantizationScheme(values="int8", group_size=16), (16,)),
    "fp8": (QuantizationScheme(values="fp8", group_size=1 << 20), (16, 64, 128)),
    "fp8g128": (QuantizationScheme(values="fp8", group_size=128), (16, 64, 128)),
}
_AOT_CODEBOOK = QuantizationScheme(values="int4", group_size=64, has_codebook=True)


def aot_cases() -> Iterator[AotCase]:
    """Schemes at one shape of Llama-3.1-8B, as an A100 and an H200 are given them; one scheme at all of its shapes."""
    for device, (name, (scheme, buckets)) in itertools.product((A100, H200), _AOT_SCHEMES.items()):
        for bucket in (16,) if device is A100 else buckets:
            yield _aot_case(name, scheme, (4096, 4096), bucket, device, "bf16", None)
    one = _AOT_SCHEMES["w4g128"][0]
    yield _aot_case("w4g128", one, (4096, 4096), 64, A100, "bf16", None)
    for shape, dtype, activation in (
        ((28672, 4096), "bf16", "silu"),
        ((28672, 4096), "bf16", None),
        ((4096, 14336), "fp16", None),
        ((855, 152), "bf16", None),
        ((854, 152), "fp16", "gelu_tanh"),
    ):
        for bucket in (16, 128):
            yield _aot_case("w4g128", one, shape, bucket, H200, dtype, activation)
    for device in (A100, H200):
        yield _aot_case("nf4g64", _AOT_CODEBOOK, (4096, 4096), 32, device, "bf16", None)


def _aot_case(
    scheme_name: str,
    scheme: QuantizationScheme,
    size: tuple[int, int],
    bucket: int,
    device: DeviceTraits,
    dtype: str,
    activation: str | None,
) -> AotCase:
    pointer = f"*{dtype}"
    shape = QuantizedShape.of(scheme, *size)
    config = chosen_config(bucket, shape, device)
    constexprs = _constexprs(shape, activation, config)
    signature = {"out_ptr": pointer, "x_ptr": pointer, "words_ptr": "*i32", "scales_ptr": "*fp32"}
    signature |= {"num_rows": "i32", "num_splits": "i32"}
    signature["stride_xt"] = "i32:16" if shape.in_features % 16 == 0 else "i32"
    optional = {
        "zeros_ptr": ("*fp32", scheme_name.endswith("z")),
        "codebook_ptr": (pointer, scheme.has_codebook),
        "bias_ptr": (pointer, dtype == "fp16"),
        "parts_ptr": ("*fp32", config.num_splits > 1),
        "arrived_ptr": ("*i32", config.num_splits > 1),
    }
    for name, (kind, is_there) in optional.items():
        if is_there:
            signature[name] = kind
        else:
            constexprs[name] = None
    # On Blackwell no codebook (see `can_pack`), no tile of more than 64 rows (see `row_tile`: Triton 3.6 makes an empty
    # kernel of one), and 8 bytes of groups of 32 are spilt.
    newest = () if scheme.has_codebook or shape.plane == 32 or config.block_t > 64 else ("sm_100",)
    name = f"weight_only/{scheme_name}/{dtype}/{shape.out_features}x{shape.in_features}"
    name += f"{'/a100' if device is A100 else ''}/t{config.block_t}"
    name += f"s{config.num_stages}{'/split' if config.num_splits > 1 else ''}{f'/{activation}' if activation else ''}"
    return AotCase(
        name,
        _weight_only_kernel,
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
        is_decode=config.block_t <= 64,
        expects_wgmma=True,
        expects_register_operand=True,
        archs=("sm_80",) if device is A100 else ("sm_90", *newest),
    )
