# SPDX-License-Identifier: Apache-2.0
"""The form the result is stored in: that of the compressed-tensors library, as llm-compressor writes it.

    pack-quantized     weight_packed int32 [N, K * bits / 32], weight_scale [N, G], weight_shape, weight_zero_point
    int-quantized      weight int8 [N, K], weight_scale [N, 1]
    float-quantized    weight float8_e4m3fn [N, K], weight_scale [N, 1] or [N / 128, K / 128]

Packed integers have no sign: 2^(bits - 1) is added. The first of a word is in its lowest bits. Zero points are packed
in the same way, down the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavetrain_engine.quantizer.recipe import BLOCK_SIZE, PER_CHANNEL, Recipe
from wavetrain_engine.quantizer.rounding import RoundedWeight

# N = outputs, K = inputs, G = groups.

_WORD_BITS = 32


def weight_tensors(name: str, weight: RoundedWeight, recipe: Recipe) -> dict[str, Tensor]:
    """Returns the tensors of a matrix by their names in the checkpoint."""
    if checkpoint_format(recipe) != "pack-quantized":
        return {f"{name}.weight": weight.values, f"{name}.weight_scale": weight.scales}
    bits = weight.grid.num_bits
    tensors = {
        f"{name}.weight_packed": pack(weight.values, bits),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.values.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        tensors[f"{name}.weight_zero_point"] = pack(weight.zero_points.t(), bits).t().contiguous()
    return tensors


def pack(values: Tensor, num_bits: int) -> Tensor:
    """Returns integers [R, C] of 2, 4 or 8 bits, in int8, as words [R, ceil(C * num_bits / 32)] of int32."""
    in_word = _WORD_BITS // num_bits
    unsigned = values.to(torch.int32) + (1 << (num_bits - 1))
    padded = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % in_word)).unflatten(1, (-1, in_word))
    words = torch.zeros(padded.shape[:2], dtype=torch.int32)
    for index in range(in_word):
        words |= padded[..., index] << (num_bits * index)
    return words


def checkpoint_format(recipe: Recipe) -> str:
    """Returns the library's name of the form."""
    scheme = recipe.weight_scheme
    if scheme.is_float:
        return "float-quantized"
    return "pack-quantized" if scheme.inputs is None else "int-quantized"


def quantization_config(recipe: Recipe, group_size: int, ignored: Sequence[str]) -> dict[str, Any]:
    """Returns what config.json says under that name.

    Args:
        ignored: names of linear layers that were left as they are.
    """
    form = checkpoint_format(recipe)
    group = {
        "format": form,
        "input_activations": _inputs(recipe),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _weights(recipe, group_size),
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": list(ignored),
        "kv_cache_scheme": _numbers(8, "float", "tensor") if recipe.has_kv_scales else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _weights(recipe: Recipe, group_size: int) -> dict[str, Any]:
    scheme = recipe.weight_scheme
    kind = "float" if scheme.is_float else "int"
    if scheme.is_blocked:
        return _numbers(8, kind, "block") | {"block_structure": [BLOCK_SIZE, BLOCK_SIZE]}
    strategy = "channel" if group_size == PER_CHANNEL else "group"
    weights = _numbers(scheme.num_bits, kind, strategy) | {"symmetric": recipe.is_symmetric}
    if strategy == "group":
        weights["group_size"] = group_size
    if recipe.method == "gptq" and recipe.has_act_order:
        weights["actorder"] = "weight"  # the order of rounding: the checkpoint's columns are where they were
    return weights


def _inputs(recipe: Recipe) -> dict[str, Any] | None:
    scheme = recipe.weight_scheme
    if scheme.inputs is None:
        return None
    kind = "float" if scheme.is_float else "int"
    if scheme.is_blocked:
        return _numbers(8, kind, "group") | {"dynamic": True, "group_size": BLOCK_SIZE}
    return _numbers(8, kind, "token") | {"dynamic": True}


def _numbers(num_bits: int, kind: str, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": num_bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
    }
