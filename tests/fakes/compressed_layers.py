# SPDX-License-Identifier: Apache-2.0
"""Layers as compressed-tensors stores them; `fakes.quantized_checkpoints` makes checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fakes.rounded_weight import dequantize_float8, pack_int32, round_float8, round_integers

Store = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
INPUT_SCALE = 0.03


def packed(bits: int, group_size: int | None, **options: Any) -> Store:
    """Integers side by side in int32s."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rounded = round_integers(weight, bits, group_size, **options)
        tensors = {
            "weight_packed": pack_int32(rounded.codes, bits),
            "weight_scale": rounded.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not options.get("is_symmetric", True):
            tensors["weight_zero_point"] = pack_int32(rounded.zeros.t(), bits).t().contiguous()
        if "order_seed" in options:
            tensors["weight_g_idx"] = rounded.groups.int()
        return tensors, rounded.dequantize()

    return store


def plain_int8(group_size: int | None = None, *, has_input_scale: bool = False, **options: Any) -> Store:
    """Integers as they are."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rounded = round_integers(weight, 8, group_size, **options)
        tensors = {"weight": (rounded.codes - 128).to(torch.int8), "weight_scale": rounded.scales}
        if not options.get("is_symmetric", True):
            tensors["weight_zero_point"] = (rounded.zeros - 128).to(torch.int8)
        if has_input_scale:
            tensors["input_scale"] = torch.tensor([INPUT_SCALE])
        return tensors, rounded.dequantize()

    return store


def plain_float8(strategy: str, block: tuple[int, int] = (128, 128), *, has_input_scale: bool = False) -> Store:
    """e4m3 numbers as they are."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        size = {"tensor": (rows, columns), "channel": (1, columns), "block": block}[strategy]
        values, scales = round_float8(weight, size)
        tensors = {"weight": values, "weight_scale": scales.view(1) if strategy == "tensor" else scales}
        if has_input_scale:
            tensors["input_scale"] = torch.tensor([INPUT_SCALE])
        return tensors, dequantize_float8(values, scales, size)

    return store


def scheme(stored: str, *, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Returns a `quantization_config` with one group, as llm-compressor writes it."""
    defaults = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": {**defaults, **weights},
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.18.0",
    }


def _inputs(kind: str, *, strategy: str = "token", dynamic: bool = True, **values: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic, **values}


_STATIC = {"strategy": "tensor", "dynamic": False}
_PACKED, _INTS, _FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_GROUP, _CHANNEL = {"strategy": "group"}, {"strategy": "channel"}

# Name → quantization_config, how a layer is stored, what inputs are rounded to.
COMPRESSED: dict[str, tuple[dict[str, Any], Store, str | None]] = {
    "w4a16-g32": (scheme(_PACKED, num_bits=4, group_size=32, **_GROUP), packed(4, 32), None),
    "w4a16-g16-asym": (
        scheme(_PACKED, num_bits=4, group_size=16, symmetric=False, **_GROUP),
        packed(4, 16, is_symmetric=False),
        None,
    ),
    "w4a16-act-order": (
        scheme(_PACKED, num_bits=4, group_size=16, actorder="group", symmetric=False, **_GROUP),
        packed(4, 16, is_symmetric=False, order_seed=3),
        None,
    ),
    "w4a16-channel": (scheme(_PACKED, num_bits=4, **_CHANNEL), packed(4, None), None),
    "w2a16-g16": (
        scheme(_PACKED, num_bits=2, group_size=16, symmetric=False, **_GROUP),
        packed(2, 16, is_symmetric=False),
        None,
    ),
    "w8a16-g32": (scheme(_PACKED, num_bits=8, group_size=32, **_GROUP), packed(8, 32), None),
    "w8a16-channel-asym": (
        scheme(_PACKED, num_bits=8, symmetric=False, **_CHANNEL),
        packed(8, None, is_symmetric=False),
        None,
    ),
    "w8a8": (scheme(_INTS, num_bits=8, inputs=_inputs("int"), **_CHANNEL), plain_int8(), "int8"),
    "w8a8-asym": (
        scheme(_INTS, num_bits=8, symmetric=False, inputs=_inputs("int"), **_CHANNEL),
        plain_int8(is_symmetric=False),
        "int8",
    ),
    "w8a8-static": (
        scheme(_INTS, num_bits=8, inputs=_inputs("int", **_STATIC), **_CHANNEL),
        plain_int8(has_input_scale=True),
        "int8-static",
    ),
    "fp8": (
        scheme(_FLOATS, num_bits=8, type="float", inputs=_inputs("float"), **_CHANNEL),
        plain_float8("channel"),
        "fp8",
    ),
    "fp8-tensor-static": (
        scheme(_FLOATS, num_bits=8, type="float", strategy="tensor", inputs=_inputs("float", **_STATIC)),
        plain_float8("tensor", has_input_scale=True),
        "fp8-static",
    ),
    "fp8a16": (scheme("naive-quantized", num_bits=8, type="float", **_CHANNEL), plain_float8("channel"), None),
    "fp8-block": (
        scheme(
            _FLOATS,
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=[128, 128],
            inputs=_inputs("float", strategy="group", group_size=128),
        ),
        plain_float8("block"),
        "fp8-128",
    ),
    "fp8-block-32x16": (
        scheme(_FLOATS, num_bits=8, type="float", strategy="block", block_structure=[32, 16]),
        plain_float8("block", (32, 16)),
        None,
    ),
}
