# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by GPTQModel: `make_gptqmodel.py MODEL OUT`; runs in its environment."""

from __future__ import annotations

import importlib.machinery
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_model import token_ids, write_answer, write_tiny_model
from transformers import LlamaForCausalLM
from transformers.utils import is_torchvision_available


def stand_in_for_torchvision() -> None:
    """GPTQModel imports it for models that see. Its wheels for CPUs are not on PyPI, and no text needs it."""
    if is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms.functional"].InterpolationMode = object


stand_in_for_torchvision()
from gptqmodel import BACKEND, GPTQModel  # noqa: E402
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig  # noqa: E402
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # noqa: E402

GPTQ: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "format": FORMAT.GPTQ}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq-asym": {**GPTQ, "sym": False},
    "gptq-v2-asym": {**GPTQ, "sym": False, "format": FORMAT.GPTQ_V2},
    "gptq-desc-act": {**GPTQ, "desc_act": True, "act_group_aware": False},
    "gptq-8bit": {**GPTQ, "bits": 8, "group_size": 64},
    "gptq-channel": {**GPTQ, "group_size": -1, "act_group_aware": False},
    "gptq-head": {**GPTQ, "lm_head": True},
    "gptq-dynamic": {
        **GPTQ,
        "dynamic": {r"-:model\.layers\.0\.mlp\..*": {}, r"+:.*self_attn\..*": {"bits": 8, "group_size": 64}},
    },
    "awq": {"bits": 4, "group_size": 32, "quant_method": METHOD.AWQ, "format": FORMAT.GEMM},
}


def quantize(source: Path, target: Path, options: dict[str, Any]) -> None:
    """Quantizes, and asks of the result what it makes of it."""
    backend = BACKEND.AWQ_TORCH if target.name == "awq" else BACKEND.GPTQ_TORCH
    if not (target / "config.json").exists():
        model = GPTQModel.load(str(source), QuantizeConfig(**options), device="cpu", dtype=torch.float32)
        ids = token_ids(16, 64, seed=5).tolist()
        calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
        model.quantize(calibration, batch_size=1, backend=backend)
        model.save(str(target))
    write_answer(dequantized(source, target, backend), target, tool="gptqmodel, transformers")


def dequantized(source: Path, target: Path, backend: BACKEND) -> LlamaForCausalLM:
    """Returns a model in float32 of the numbers that the tool makes of the checkpoint: its products are of 16 bits."""
    loaded = GPTQModel.load(str(target), device="cpu", backend=backend, dtype=torch.float16).model
    stored = load_file(target / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = loaded.get_submodule(name.rpartition(".")[0])
            parameter.copy_(dense_weight(module) if hasattr(module, "qweight") else stored[name])
    return model


def dense_weight(module: Any) -> torch.Tensor:
    """Returns the weight [N, K] of a quantized layer, in float32."""
    module.scales = module.scales.float()
    if not hasattr(module, "dequantize_weight"):
        parts = (module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
        return dequantize_gemm(*parts).t().float()
    return module.dequantize_weight().t().float()


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    write_tiny_model(source)
    for name, options in RECIPES.items():
        target = out / name
        if (sys.argv[3:] and name not in sys.argv[3:]) or (target / "oracle.json").exists():
            continue
        try:
            quantize(source, target, options)
        except Exception:  # one tool's trouble with one scheme is no reason to go without the others
            print(f"FAILED {name}: could not be made", traceback.format_exc(limit=-3), sep="\n")


if __name__ == "__main__":
    main()
