# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by llm-compressor and bitsandbytes: `make_llm_compressor.py MODEL OUT`; runs in their environment."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_model import token_ids, write_answer, write_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

IGNORED = ["lm_head"]


def by_scheme(scheme: str, **options: Any) -> QuantizationModifier:
    """Round to nearest, all projections alike."""
    return QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORED, **options)


def in_groups(size: int, *, symmetric: bool, bits: int = 4, **options: Any) -> QuantizationScheme:
    """Integers in groups."""
    args = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size, "symmetric": symmetric, **options}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def mixed() -> QuantizationModifier:
    """w8a8 in attention, w4a16 in feed-forward blocks."""
    w8a8 = QuantizationScheme(
        targets=["re:.*self_attn.*_proj"],
        weights=QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True),
        input_activations=QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True),
    )
    w4a16 = QuantizationScheme(
        targets=["re:.*mlp.*_proj"],
        weights=QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True),
    )
    return QuantizationModifier(config_groups={"a": w8a8, "b": w4a16}, ignore=IGNORED)


KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
RECIPES: dict[str, Callable[[], Any]] = {
    "w4a16": lambda: by_scheme("W4A16"),
    "w4a16-asym": lambda: by_scheme("W4A16_ASYM"),
    "w4a16-g32-asym": lambda: QuantizationModifier(config_groups={"a": in_groups(32, symmetric=False)}, ignore=IGNORED),
    "w2a16": lambda: QuantizationModifier(config_groups={"a": in_groups(32, symmetric=True, bits=2)}, ignore=IGNORED),
    "w8a16": lambda: by_scheme("W8A16"),
    "w8a8": lambda: by_scheme("W8A8"),
    "fp8": lambda: by_scheme("FP8"),
    "fp8-dynamic": lambda: by_scheme("FP8_DYNAMIC"),
    "fp8-block": lambda: by_scheme("FP8_BLOCK"),
    "w4a16-kv": lambda: by_scheme("W4A16", kv_cache_scheme=KV_CACHE),
    "mixed": mixed,
    "w8a16-head": lambda: QuantizationModifier(targets="Linear", scheme="W8A16", ignore=[]),
    "gptq-weight-order": lambda: GPTQModifier(
        config_groups={"a": in_groups(128, symmetric=True, actorder="weight")}, ignore=IGNORED
    ),
}
BITSANDBYTES = {
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "bnb-nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "bnb-int8": {"load_in_8bit": True},
}


def compress(source: Path, target: Path, recipe: Any) -> None:
    """Quantizes with llm-compressor, and asks transformers about the result."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = token_ids(8, 64, seed=5)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=8, max_seq_length=64)
    model.save_pretrained(target, save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(without_kv_scheme(target), dtype=torch.float32)
    write_answer(loaded, target, tool="llm-compressor, transformers")


def without_kv_scheme(directory: Path) -> Path:
    """Returns the checkpoint, or a copy that does not ask for keys and values in few bits: that is another question."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config["quantization_config"].get("kv_cache_scheme") is None:
        return directory
    config["quantization_config"]["kv_cache_scheme"] = None
    copy = directory.with_name(f"{directory.name}-as-asked")
    shutil.copytree(directory, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def load_in_few_bits(source: Path, target: Path, options: dict[str, Any]) -> None:
    """Quantizes with bitsandbytes as the checkpoint is loaded."""
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(target)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, device_map="cpu")
    # Its own products round to bfloat16, or inputs to 8 bits.
    write_answer(loaded.dequantize(), target, tool="bitsandbytes, transformers")


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    write_tiny_model(source)
    wanted = sys.argv[3:]
    jobs: dict[str, Callable[[Path], None]] = {}
    for name, recipe in RECIPES.items():
        jobs[name] = lambda target, recipe=recipe: compress(source, target, recipe())
    for name, options in BITSANDBYTES.items():
        jobs[name] = lambda target, options=options: load_in_few_bits(source, target, options)
    for name, job in jobs.items():
        target = out / name
        if (wanted and name not in wanted) or (target / "oracle.json").exists():
            continue
        try:
            job(target)
        except Exception:  # one tool's trouble with one scheme is no reason to go without the others
            print(f"FAILED {name}: could not be made", traceback.format_exc(limit=-3), sep="\n")


if __name__ == "__main__":
    main()
