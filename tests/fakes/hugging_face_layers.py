# SPDX-License-Identifier: Apache-2.0
"""Layers as GPTQ, AWQ, fp8 and bitsandbytes store them; `fakes.quantized_checkpoints` makes checkpoints of them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fakes.compressed_layers import INPUT_SCALE, Store
from fakes.rounded_weight import dequantize_float8, pack_int32, round_float8, round_integers

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(bits: int, group_size: int | None, *, version: int = 1, **options: Any) -> Store:
    """AutoGPTQ's words, of columns; zero points minus 1 in version 1."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rounded = round_integers(weight, bits, group_size, **options)
        zeros = pack_int32(rounded.zeros.t(), bits).long()
        if version == 1:  # from whole words, as GPTQModel does it
            zeros -= sum(1 << (bits * field) for field in range(32 // bits))
        zeros = (zeros + 2**31) % 2**32 - 2**31
        tensors = {
            "qweight": pack_int32(rounded.codes, bits).t().contiguous(),
            "qzeros": zeros.int(),
            "scales": rounded.scales.t().contiguous(),
            "g_idx": rounded.groups.int(),
        }
        return tensors, rounded.dequantize()

    return store


def awq(group_size: int) -> Store:
    """AutoAWQ's words, of outputs in an order of their own."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rounded = round_integers(weight, 4, group_size, is_symmetric=False)

        def words(codes: Tensor) -> Tensor:
            mixed = codes.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1)
            return pack_int32(mixed, 4)

        tensors = {
            "qweight": words(rounded.codes.t()),
            "qzeros": words(rounded.zeros.t()),
            "scales": rounded.scales.t().contiguous(),
        }
        return tensors, rounded.dequantize()

    return store


def float8(block: tuple[int, int] | None, *, scale: str, input_scale: str | None = None) -> Store:
    """e4m3 numbers with scales of blocks, or one."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = block or (weight.shape[0], weight.shape[1])
        values, scales = round_float8(weight, size)
        tensors = {"weight": values, scale: scales if block else scales.view(())}
        if input_scale is not None:
            tensors[input_scale] = torch.tensor(INPUT_SCALE)
        return tensors, dequantize_float8(values, scales, size)

    return store


def four_bit(kind: str = "nf4", *, is_nested: bool = False, block_size: int = 64) -> Store:
    """bitsandbytes: blocks of the flat weight, each number the nearest of 16."""
    codebook = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.5

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = weight.flatten().view(-1, block_size)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block_size, "dtype": "float32"}
        state["shape"] = list(weight.shape)
        tensors: dict[str, Tensor] = {"weight.absmax": absmax, "weight.quant_map": codebook.clone()}
        if is_nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": absmax.mean().item()}
            parts = (absmax - absmax.mean()).split(256)
            outer = torch.stack([part.abs().max() for part in parts])
            inner_map = torch.linspace(-1, 1, 256)
            codes = [
                (part / most - inner_map[:, None]).abs().argmin(0) for part, most in zip(parts, outer, strict=True)
            ]
            tensors["weight.absmax"] = torch.cat(codes).to(torch.uint8)
            tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": inner_map}
            exact = [inner_map[code] * most for code, most in zip(codes, outer, strict=True)]
            absmax = torch.cat(exact) + state["nested_offset"]
        chosen = (blocks[..., None] / absmax[:, None, None] - codebook).abs().argmin(-1)
        flat = chosen.flatten().to(torch.uint8)
        tensors["weight"] = (flat[::2] << 4 | flat[1::2]).view(-1, 1)
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors, (codebook[chosen] * absmax[:, None]).view(weight.shape)

    return store


def eight_bit(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LLM.int8()."""
    largest = weight.abs().amax(1)
    values = (weight / largest.where(largest > 0, 1.0)[:, None] * 127).round().to(torch.int8)
    tensors = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, values.float() * (largest / 127)[:, None]


def _gptq_config(bits: int, group_size: int, **values: Any) -> dict[str, Any]:
    defaults = {"desc_act": False, "sym": True, "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32"}
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **defaults, **values}


def _bnb_config(**values: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False, **values}


_AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
_FP8_CONFIG: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

# Name → quantization_config, how a layer is stored, what inputs are rounded to.
HUGGING_FACE: dict[str, tuple[dict[str, Any], Store, str | None]] = {
    "gptq": (_gptq_config(4, 32), gptq(4, 32), None),
    "gptq-asym": (_gptq_config(4, 16, sym=False), gptq(4, 16, is_symmetric=False), None),
    "gptq-act-order": (
        _gptq_config(4, 16, desc_act=True, sym=False, checkpoint_format="gptq_v2"),
        gptq(4, 16, version=2, is_symmetric=False, order_seed=5),
        None,
    ),
    "gptq-8bit-channel": (_gptq_config(8, -1), gptq(8, None), None),
    "gptq-2bit": (_gptq_config(2, 16, sym=False), gptq(2, 16, is_symmetric=False), None),
    "awq": ({**_AWQ_CONFIG, "group_size": 32}, awq(32), None),
    "fp8-hf-block": (
        {**_FP8_CONFIG, "weight_block_size": [128, 128]},
        float8((128, 128), scale="weight_scale_inv"),
        "fp8-128",
    ),
    "fp8-hf-block-32": (
        {**_FP8_CONFIG, "weight_block_size": [32, 32]},
        float8((32, 32), scale="weight_scale_inv"),
        None,
    ),
    "fp8-hf-static": (
        {**_FP8_CONFIG, "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        float8(None, scale="weight_scale", input_scale="input_scale"),
        "fp8-static",
    ),
    "bnb-nf4": (_bnb_config(**_NF4), four_bit(), None),
    "bnb-nf4-nested": (_bnb_config(**_NF4, bnb_4bit_use_double_quant=True), four_bit(is_nested=True), None),
    "bnb-fp4": (_bnb_config(load_in_4bit=True, bnb_4bit_quant_type="fp4"), four_bit("fp4"), None),
    "bnb-int8": (_bnb_config(load_in_8bit=True), eight_bit, None),
}
