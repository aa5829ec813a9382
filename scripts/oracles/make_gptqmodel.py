# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by GPTQModel: `make_gptqmodel.py MODEL OUT`; runs in its environment."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
from tiny_model import token_ids, write_answer, write_tiny_model

GPTQ: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "format": FORMAT.GPTQ}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq-asym": {**GPTQ, "sym": False},
    "gptq-v2-asym": {**GPTQ, "sym": False, "format": FORMAT.GPTQ_V2},
    "gptq-desc-act": {**GPTQ, "desc_act": True, "act_group_aware": False},
    "gptq-8bit": {**GPTQ, "bits": 8, "group_size": 64},
    "gptq-channel": {**GPTQ, "group_size": -1},
    "gptq-head": {**GPTQ, "lm_head": True},
    "gptq-dynamic": {
        **GPTQ,
        "dynamic": {r"-:model\.layers\.0\.mlp\..*": {}, r"+:.*self_attn\..*": {"bits": 8, "group_size": 64}},
    },
    "awq": {"bits": 4, "group_size": 32, "quant_method": METHOD.AWQ, "format": FORMAT.GEMM},
}


def quantize(source: Path, target: Path, options: dict[str, Any]) -> None:
    """Quantizes, and asks the result loaded again, with kernels in plain torch."""
    config = QuantizeConfig(**options)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float32)
    ids = token_ids(16, 64, seed=5)
    model.quantize([{"input_ids": row, "attention_mask": [1] * 64} for row in ids.tolist()], batch_size=1)
    model.save(str(target))
    backend = BACKEND.TORCH_AWQ if "awq" in target.name else BACKEND.TORCH
    loaded = GPTQModel.load(str(target), device="cpu", backend=backend, dtype=torch.float32)
    write_answer(loaded.model, target, tool="gptqmodel")


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
