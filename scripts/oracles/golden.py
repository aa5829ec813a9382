# SPDX-License-Identifier: Apache-2.0
"""Layers as others' tools store them, with the numbers the tools make of them, for tests to keep.

    golden.py compressed-tensors|bitsandbytes OUT          in the environment of llm-compressor
    golden.py gptqmodel OUT CHECKPOINT ...                 in the environment of GPTQModel

Writes OUT/TOOL.safetensors: `case/tensor` for every tensor of a layer, `case/dense` for its numbers, and the
`quantization_config` of each case, as JSON, in the header.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Case = tuple[dict[str, Any], dict[str, Tensor], Tensor]


def random_weight(rows: int = 16, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.1


def compressed_tensors() -> dict[str, Case]:
    """Of every layout, by the package's own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    group = {"strategy": "group", "group_size": 32}
    layouts: dict[str, tuple[str, dict[str, Any]]] = {
        "w4": ("pack-quantized", {"num_bits": 4, **group}),
        "w4-asym": ("pack-quantized", {"num_bits": 4, "symmetric": False, **group}),
        "w4-act-order": ("pack-quantized", {"num_bits": 4, "symmetric": False, "actorder": "group", **group}),
        "w2-asym": ("pack-quantized", {"num_bits": 2, "symmetric": False, **group}),
        "w8-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8-block": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        ),
    }
    cases: dict[str, Case] = {}
    for name, (layout, options) in layouts.items():
        args = QuantizationArgs(**options)
        weight = random_weight()
        state: dict[str, Any] = {"weight": weight}
        parts = weight.view(weight.shape[0], -1, options.get("group_size", weight.shape[1]))
        if options.get("actorder"):
            state["weight_g_idx"] = (torch.arange(64) * 37 % 64 // 32).int()
            parts = weight[:, state["weight_g_idx"].argsort(stable=True)].view(weight.shape[0], -1, 32)
        low, high = parts.amin(-1), parts.amax(-1)
        if options["strategy"] == "block":
            low, high = low.amin().view(1, 1), high.amax().view(1, 1)
        scales, zeros = calculate_qparams(low, high, args)
        state["weight_scale"] = scales
        if not options.get("symmetric", True):
            state["weight_zero_point"] = zeros.to(torch.int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress(state, scheme)
        dense = compressor.decompress(stored, scheme)["weight"]
        weights = {"type": "int", "symmetric": True, **options}
        config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "format": layout}
        cases[name] = ({"quant_method": "compressed-tensors", **config}, stored, dense)
    return cases


def bitsandbytes() -> dict[str, Case]:
    """4 bits, plain and nested, and 8."""
    from bitsandbytes import functional

    cases: dict[str, Case] = {}
    for name, kind, is_nested in (("nf4", "nf4", False), ("nf4-nested", "nf4", True), ("fp4", "fp4", False)):
        weight = random_weight(16, 128)
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=is_nested, quant_type=kind)
        stored = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        dense = functional.dequantize_4bit(packed, state)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        cases[name] = ({**config, "bnb_4bit_use_double_quant": is_nested}, {"weight": packed, **stored}, dense)
    weight = random_weight(16, 128)
    values, largest, _ = functional.int8_vectorwise_quant(weight.half())
    stored = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    dense = functional.int8_vectorwise_dequant(values, largest)
    cases["int8"] = ({"quant_method": "bitsandbytes", "load_in_8bit": True}, stored, dense.float())
    return cases


def gptqmodel(checkpoints: list[str]) -> dict[str, Case]:
    """The first outputs of a layer of checkpoints that `make_gptqmodel.py` made."""
    from make_gptqmodel import BACKEND, GPTQModel, dense_weight

    cases: dict[str, Case] = {}
    for path in map(Path, checkpoints):
        backend = BACKEND.AWQ_TORCH if path.name == "awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(path), device="cpu", backend=backend, dtype=torch.float16)
        module = model.model.model.layers[1].self_attn.k_proj
        dense = dense_weight(module)[:8]
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        cases[path.name] = (config, first_outputs(path, per_word=32 // config["bits"]), dense)
    return cases


def first_outputs(path: Path, *, per_word: int, count: int = 8) -> dict[str, Tensor]:
    """Returns what the file holds of the layer, cut."""
    from safetensors.torch import load_file

    layer = "model.layers.1.self_attn.k_proj."
    tensors = {
        name.removeprefix(layer): item for name, item in load_file(path / "model.safetensors").items() if layer in name
    }
    is_awq = "g_idx" not in tensors
    widths = {"qweight": count // per_word if is_awq else count, "qzeros": count // per_word, "scales": count}
    return {name: item[:, : widths[name]] if name in widths else item for name, item in tensors.items()}


def main() -> None:
    tool, out = sys.argv[1], Path(sys.argv[2])
    made = {
        "compressed-tensors": compressed_tensors,
        "bitsandbytes": bitsandbytes,
        "gptqmodel": lambda: gptqmodel(sys.argv[3:]),
    }[tool]()
    tensors = {
        f"{case}/{name}": item.clone().contiguous()
        for case, (_, stored, dense) in made.items()
        for name, item in {**stored, "dense": dense}.items()
    }
    header = {case: json.dumps(config) for case, (config, _, _) in made.items()}
    save_file(tensors, out / f"{tool}.safetensors", header)


if __name__ == "__main__":
    main()
