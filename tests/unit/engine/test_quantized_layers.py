# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a quantized layer to its weight: exact, or an error that names the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes.compressed_layers import packed, plain_float8, plain_int8, scheme
from fakes.hugging_face_layers import four_bit
from fakes.quantized_checkpoints import RECIPES, Recipe
from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.quantization.decode import decode
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_engine.quantization.quantization_config import parse_quantization
from wavetrain_engine.quantization.stored_format import StoredFormat
from wavetrain_kernels.ops import QuantizedWeight, dequantize

LAYER = "model.layers.3.self_attn.q_proj"
Tensors = dict[str, Tensor]
_SAFETENSORS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def format_of(recipe: Recipe) -> StoredFormat:
    config = parse_quantization(ConfigReader({"quantization_config": dict(recipe.config)}, "config.json"))
    assert config is not None
    stored = config.format_of(LAYER, "Linear")
    assert stored is not None
    return stored


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def read(recipe: Recipe, tensors: Tensors, rows: int, columns: int) -> QuantizedWeight:
    return decode(format_of(recipe), LayerTensors(LAYER, tensors), rows, columns)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(64, 96), (160, 256), (64, 320)])
def test_every_format_is_read_to_the_number(name: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    tensors, want = RECIPES[name].store(random_weight(rows, columns))
    specs = format_of(RECIPES[name]).tensors(rows, columns)
    assert all(specs[item].allows(_SAFETENSORS[value.dtype], tuple(value.shape)) for item, value in tensors.items())
    assert all(item in tensors or spec.is_optional for item, spec in specs.items())
    weight = read(RECIPES[name], tensors, rows, columns)
    # With zero points, code * scale and zero * scale are rounded one by one.
    atol = 2e-7 if weight.scheme.has_offsets else 0
    torch.testing.assert_close(dequantize(weight), want, rtol=1e-6 if atol else 0, atol=atol)


def test_scales_of_few_bits_and_zero_points_as_they_are() -> None:
    weight = random_weight(32, 64)
    for dtype in (torch.float16, torch.bfloat16):
        tensors, want = packed(4, 32, is_symmetric=False, scale_dtype=dtype)(weight)
        tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
        recipe = Recipe(
            scheme("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False), packed(4, 32)
        )
        torch.testing.assert_close(dequantize(read(recipe, tensors, 32, 64)), want, rtol=1e-6, atol=1e-6)
        # As versions of the package before they were packed too.
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        zeros = tensors["weight_zero_point"].t()[..., None] >> shifts & 15
        tensors["weight_zero_point"] = (zeros.flatten(1)[:, :32].t() - 8).to(torch.int8)
        torch.testing.assert_close(dequantize(read(recipe, tensors, 32, 64)), want, rtol=1e-6, atol=1e-6)


def test_a_group_order_that_is_none_is_not_kept() -> None:
    recipe = RECIPES["w4a16-act-order"]
    for groups in (torch.arange(96, dtype=torch.int32) // 16, torch.full((96,), -1, dtype=torch.int32)):
        tensors, _ = packed(4, 16, is_symmetric=False)(random_weight(64, 96))
        weight = read(recipe, {**tensors, "weight_g_idx": groups}, 64, 96)
        assert not weight.scheme.is_reordered


def test_gptq_zero_points_of_0_borrow_from_their_neighbours() -> None:
    weight = random_weight(64, 96).abs()  # smallest code 0 means 0
    tensors, want = RECIPES["gptq-asym"].store(weight)
    torch.testing.assert_close(dequantize(read(RECIPES["gptq-asym"], tensors, 64, 96)), want, rtol=1e-6, atol=2e-7)


def test_a_symmetric_gptq_file_with_zero_points_is_read_with_them() -> None:
    tensors, want = RECIPES["gptq-asym"].store(random_weight(64, 96))
    recipe = Recipe({**RECIPES["gptq-asym"].config, "sym": True}, RECIPES["gptq-asym"].store)
    weight = read(recipe, tensors, 64, 96)
    assert weight.scheme.has_offsets
    torch.testing.assert_close(dequantize(weight), want, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize(("columns", "block"), [(96, 64), (64, 64), (80, 128), (64, 256)])
def test_blocks_of_bitsandbytes_go_on_from_row_to_row(columns: int, block: int) -> None:
    tensors, want = four_bit(block_size=block)(random_weight(64, columns))
    weight = read(RECIPES["bnb-nf4"], tensors, 64, columns)
    assert torch.equal(dequantize(weight), want)


def test_bytes_that_pass_for_another_dtype() -> None:
    tensors, want = four_bit()(random_weight(64, 128))
    tensors["weight"] = tensors["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(dequantize(read(RECIPES["bnb-nf4"], tensors, 64, 128)), want)


def test_an_empty_group_may_have_scale_0() -> None:
    weight = random_weight(64, 96)
    weight[3, :32] = 0
    for name, scales in (("w4a16-g32", "weight_scale"), ("gptq", "scales"), ("awq", "scales"), ("bnb-int8", "SCB")):
        tensors, want = RECIPES[name].store(weight if name != "bnb-int8" else weight * (weight[:, :1] != 0))
        assert tensors[scales].eq(0).any()
        torch.testing.assert_close(dequantize(read(RECIPES[name], tensors, 64, 96)), want, rtol=1e-6, atol=2e-7)


def _set(name: str, value: float, where: Any = 0) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name].view(-1)[where] = value

    return edit


def _put(name: str, value: Tensor) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = value

    return edit


DAMAGED: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("w4a16-g32", _set("weight_scale", float("nan"), 7), "weight_scale holds scales that are not finite"),
    ("w4a16-g32", _set("weight_scale", float("inf")), "weight_scale holds scales that are not finite"),
    ("w4a16-g32", _set("weight_scale", 3e38), "weight_scale holds scales so large"),
    ("w4a16-g32", _set("weight_scale", 0.0), "weight_scale holds scales of 0 for values that are not 0"),
    ("w4a16-g32", _set("weight_shape", 65), r"weight_shape is \[65, 96\], not \[64, 96\]"),
    ("w4a16-g16-asym", _set("weight_scale", 0.0, 9), "weight_scale holds scales of 0"),
    ("w4a16-act-order", _set("weight_g_idx", 6, 5), "weight_g_idx names groups that do not exist: there are 6"),
    ("w4a16-act-order", _set("weight_g_idx", -1, 5), "weight_g_idx names groups that do not exist"),
    ("w4a16-act-order", _set("weight_g_idx", 0, slice(0, 40)), "weight_g_idx does not give every group its 16 inputs"),
    (
        "w8a8",
        _put("weight_zero_point", torch.ones(64, 1, dtype=torch.int8)),
        "weight_zero_point holds zero points, but",
    ),
    ("w8a8-static", _set("input_scale", 0.0), "input_scale must be positive"),
    ("w8a8-static", _set("input_scale", float("nan")), "input_scale holds scales that are not finite"),
    ("w8a8-static", _put("input_zero_point", torch.ones(1, dtype=torch.int8)), "input_zero_point holds zero points"),
    ("fp8", _set("weight", float("nan"), 70), "weight holds values that are not a number"),
    ("fp8", _set("weight_scale", -1.0), "weight_scale holds negative scales"),
    ("fp8-block", _set("weight_scale", 0.0), "weight_scale holds scales of 0"),
    ("gptq", _set("scales", 0.0), "scales holds scales of 0"),
    ("gptq-act-order", _set("g_idx", 99, 3), "g_idx names groups that do not exist"),
    ("awq", _set("scales", float("nan")), "scales holds scales that are not finite"),
    ("fp8-hf-static", lambda tensors: tensors.pop("weight_scale"), "weight_scale_inv and weight_scale are two names"),
    ("fp8-hf-static", lambda tensors: tensors.pop("input_scale"), "input_scale and activation_scale are two names"),
    ("bnb-int8", _put("weight_format", torch.tensor(1, dtype=torch.uint8)), "weight_format is 1: only rows"),
    ("bnb-int8", _set("SCB", 0.0), "SCB holds scales of 0"),
    ("bnb-nf4", _set("weight.absmax", float("inf")), "weight.absmax holds scales that are not finite"),
    ("bnb-nf4", _set("weight.quant_map", float("nan")), "weight.quant_map holds scales that are not finite"),
    ("bnb-nf4-nested", _set("weight.nested_absmax", float("nan")), "weight.nested_absmax holds scales that"),
]


@pytest.mark.parametrize(("name", "edit", "message"), DAMAGED, ids=[f"{case[0]}-{case[2][:30]}" for case in DAMAGED])
def test_numbers_that_make_no_sense_are_named(name: str, edit: Callable[[Tensors], None], message: str) -> None:
    tensors, _ = RECIPES[name].store(random_weight(64, 96))
    edit(tensors)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.{message}"):
        read(RECIPES[name], tensors, 64, 96)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff", b"[" * 4000, b'{"quant_type": "fp4"}', b'{"quant_type": "nf4", "blocksize": "x"}',
     b'{"quant_type": "nf4", "blocksize": 64, "shape": [96, 64]}',
     b'{"quant_type": "nf4", "blocksize": 64, "shape": 3}',
     b'{"quant_type": "nf4", "blocksize": 128, "shape": [64, 96]}'],
)  # fmt: skip
def test_what_bitsandbytes_says_of_a_layer_is_checked(text: bytes) -> None:
    tensors, _ = four_bit()(random_weight(64, 96))
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"weight\.(quant_state\.bitsandbytes__nf4|absmax) "):
        read(RECIPES["bnb-nf4"], tensors, 64, 96)


def test_4_bit_values_stored_as_bytes() -> None:
    config = scheme("int-quantized", num_bits=4, strategy="channel")
    tensors, _ = plain_int8()(random_weight(32, 64))
    with pytest.raises(CheckpointError, match="weight holds values that 4 bits cannot hold"):
        read(Recipe(config, plain_int8()), tensors, 32, 64)
    tensors["weight"] = tensors["weight"].clamp(-8, 7)
    weight = read(Recipe(config, plain_int8()), tensors, 32, 64)
    assert weight.scheme.values == "int4"
    assert torch.equal(dequantize(weight), tensors["weight"].float() * tensors["weight_scale"])


def test_fp8_scales_of_8_bits() -> None:
    tensors, _ = plain_float8("block", (32, 32))(random_weight(64, 96))
    exponents = torch.full((2, 3), 120, dtype=torch.uint8)  # 2 ** -7
    tensors = {"weight": tensors["weight"], "weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}
    weight = read(RECIPES["fp8-hf-block-32"], tensors, 64, 96)
    assert torch.equal(dequantize(weight), tensors["weight"].float() / 128)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(RECIPES)),
    which=st.integers(0, 10),
    damage=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_are_refused_or_numbers(name: str, which: int, damage: list[tuple[int, int]]) -> None:
    stored, _ = RECIPES[name].store(random_weight(32, 64))
    tensors = {item: value.clone() for item, value in stored.items()}
    target = tensors[sorted(tensors)[which % len(tensors)]]
    raw = target.contiguous().view(-1).view(torch.uint8)
    for position, value in damage:
        raw[position % raw.shape[0]] = value
    try:
        weight = read(RECIPES[name], tensors, 32, 64)
    except CheckpointError:
        return
    dense = dequantize(weight)
    assert dense.shape == (32, 64)
    assert dense.isfinite().all()
