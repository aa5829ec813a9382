# SPDX-License-Identifier: Apache-2.0
"""Layers that others' tools wrote, read to the numbers that those tools make of them (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.quantization.decode import decode
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_engine.quantization.quantization_config import parse_quantization
from wavetrain_kernels.ops import dequantize

GOLDEN = Path(__file__).parents[2] / "golden"
LAYER = "model.layers.1.self_attn.k_proj"


def load_cases() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    cases: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for case, config in sorted(file.metadata().items()):  # its own order is another in each process
                names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118  # no mapping
                tensors = {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}
                cases[f"{path.stem}: {case}"] = json.loads(config), tensors
    return cases


CASES = load_cases()


@pytest.mark.parametrize("name", CASES)
def test_layers_of_others_are_read_to_the_number(name: str) -> None:
    values, tensors = CASES[name]
    want = tensors["dense"]
    rows, columns = want.shape
    config = parse_quantization(ConfigReader({"quantization_config": values}, "config.json"))
    stored = None if config is None else config.format_of(LAYER, "Linear")
    assert stored is not None
    assert (set(tensors) - {"dense"}) <= set(stored.tensors(rows, columns))
    weight = decode(stored, LayerTensors(LAYER, tensors), rows, columns)
    got = dequantize(weight).to(want.dtype)
    if weight.scheme.has_offsets:  # code * scale and zero * scale are rounded one by one
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    elif name.endswith("int8") and name.startswith("bitsandbytes"):  # its scale is 1 / 127 rounded first
        torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
    else:
        assert torch.equal(got, want)


def test_every_tool_is_there() -> None:
    assert {name.partition(":")[0] for name in CASES} == {"bitsandbytes", "compressed-tensors", "gptqmodel"}
