# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of every format, written from unquantized ones by the formats' own definitions.

Each is written twice: as it is stored, and dequantized, for transformers to be the oracle of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fakes.compressed_layers import COMPRESSED, Store
from fakes.hugging_face_layers import HUGGING_FACE

SINGLE = "model.safetensors"
_LINEAR = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")


@dataclass(frozen=True)
class Recipe:
    """A format: what config.json says, and how a weight [N, K] is stored.

    Attributes:
        inputs: what inputs are rounded to before they are multiplied.
        skipped: parts of names of layers that are not quantized.
        extra: parts of names of layers that are, beside the projections.
    """

    config: Mapping[str, Any]
    store: Store
    inputs: str | None = None
    skipped: tuple[str, ...] = ("lm_head",)
    extra: tuple[str, ...] = ()


RECIPES: dict[str, Recipe] = {
    name: Recipe(config, store, inputs) for name, (config, store, inputs) in {**COMPRESSED, **HUGGING_FACE}.items()
}


def is_quantized(name: str, recipe: Recipe) -> bool:
    """Whether the recipe quantizes a tensor of this name."""
    layer = name.removesuffix(".weight")
    is_meant = (*_LINEAR, *(f"{part}.weight" for part in recipe.extra), "lm_head.weight")
    return name.endswith(is_meant) and not any(part in layer for part in recipe.skipped)


def write_quantized(
    source: Path, directory: Path, recipe: Recipe, *, per_layer: Mapping[str, Recipe] | None = None
) -> tuple[Path, Path]:
    """Quantizes the checkpoint `source`; returns the folder of the result and of the same, dequantized.

    Args:
        per_layer: parts of a name → what is used for such layers in place of `recipe`.
    """
    tensors = load_file(source / SINGLE)
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored[name] = dense[name] = tensor
        if not is_quantized(name, recipe):
            continue
        special = [other for part, other in (per_layer or {}).items() if part in name]
        del stored[name]
        parts, dense[name] = (special[0] if special else recipe).store(tensor.float())
        stored.update({f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()})
    for folder, content, config in (("quantized", stored, recipe.config), ("dequantized", dense, None)):
        target = directory / folder
        shutil.copytree(source, target)
        save_file(
            {name: item.clone().contiguous() for name, item in content.items()}, target / SINGLE, {"format": "pt"}
        )
        if config is not None:
            values = json.loads((target / "config.json").read_text())
            (target / "config.json").write_text(json.dumps({**values, "quantization_config": dict(config)}))
    return directory / "quantized", directory / "dequantized"


def change_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the `quantization_config` of a checkpoint."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    edit(values["quantization_config"])
    path.write_text(json.dumps(values))
