# SPDX-License-Identifier: Apache-2.0
"""`quantization_config`: which layers are quantized and how; whatever is not served is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.compressed_layers import scheme
from fakes.quantized_checkpoints import RECIPES
from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from wavetrain_engine.quantization.module_targets import LayerTargets, SkippedModules
from wavetrain_engine.quantization.quantization_config import parse_quantization
from wavetrain_engine.quantization.stored_format import QuantizationConfig

LAYER = "model.layers.3.self_attn.q_proj"
W4 = {"num_bits": 4, "group_size": 32, "strategy": "group"}


def parse(values: dict[str, Any], key: str = "quantization_config") -> QuantizationConfig:
    config = parse_quantization(ConfigReader({key: values}, "config.json"))
    assert config is not None
    return config


def describe(config: QuantizationConfig, layer: str = LAYER) -> str | None:
    stored = config.format_of(layer, "Linear")
    return None if stored is None else stored.describe()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_understood(name: str) -> None:
    config = parse(dict(RECIPES[name].config))
    assert config.format_of(LAYER, "Linear") is not None
    assert config.format_of("lm_head", "Linear") is None
    assert config.format_of("model.embed_tokens", "Embedding") is None


def test_no_quantization_is_none() -> None:
    assert parse_quantization(ConfigReader({}, "config.json")) is None
    assert parse_quantization(ConfigReader({"quantization_config": None}, "config.json")) is None


def test_the_old_key_and_no_method_are_compressed_tensors() -> None:
    values = scheme("pack-quantized", **W4)
    del values["quant_method"]
    assert describe(parse(values, "compression_config")) == "w4a16, groups of 32"
    with pytest.raises(ConfigError, match="two names of one thing"):
        parse_quantization(
            ConfigReader({"quantization_config": values, "compression_config": {"config_groups": {}, "x": 1}}, "c")
        )


def _compressed(stored: str = "pack-quantized", group: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    config = scheme(stored, **W4)
    config["config_groups"]["group_0"] |= group or {}
    return {**config, **values}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"quant_method": "hqq"}, UnsupportedModelError, "'hqq' is not supported; supported are compressed-tensors, gptq"),
    ({"quant_method": "mxfp4"}, UnsupportedModelError, "'mxfp4'"),
    ({"bits": 4}, ConfigError, "quant_method is missing"),
    (_compressed(config_groups={}), ConfigError, "config_groups must be an object of 1"),
    (_compressed(sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedModelError, "sparse-24-bitmask"),
    (_compressed(transform_config={"config_groups": {"u": {}}}), UnsupportedModelError, "transform_config"),
    (_compressed(quantization_status="frozen"), UnsupportedModelError, "'frozen'"),
    (_compressed("marlin-24"), UnsupportedModelError, "int4 weights as 'marlin-24'"),
    (
        _compressed("nvfp4-pack-quantized", {"weights": {"num_bits": 4, "type": "float"}}),
        UnsupportedModelError,
        "float4",
    ),
    (_compressed(group={"weights": {**W4, "num_bits": 3}}), UnsupportedModelError, "int3 weights as 'pack-quantized'"),
    (_compressed(group={"weights": {**W4, "group_size": 24}}), UnsupportedModelError, "groups of 24"),
    (_compressed(group={"weights": {**W4, "group_size": None}}), ConfigError, "group_size must be positive"),
    (_compressed(group={"weights": {**W4, "strategy": "tensor_group"}}), UnsupportedModelError, "'tensor_group'"),
    (_compressed(group={"weights": {**W4, "actorder": "random"}}), ConfigError, "actorder must be"),
    (_compressed(group={"weights": None}), UnsupportedModelError, "has no weights"),
    (_compressed(group={"targets": []}), ConfigError, "targets must name"),
    (_compressed(group={"targets": ["re:(a+)+$"]}), ConfigError, "may take for ever"),
    (_compressed(group={"targets": ["re:" + ".*" * 7]}), ConfigError, "may take for ever"),
    (_compressed(group={"targets": ["re:(["]}), ConfigError, "not a valid regular expression"),
    (_compressed(group={"output_activations": {"num_bits": 8}}), UnsupportedModelError, "output_activations"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 32}, UnsupportedModelError, "3 bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 8}, UnsupportedModelError, "group_size 8"),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
        UnsupportedModelError,
        "'marl",
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int64"}, UnsupportedModelError, "pack_dtype"),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {".*": {"bits": 3}}},
        UnsupportedModelError,
        "3 bits",
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"(a*)*": {}}}, ConfigError, "for ever"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, UnsupportedModelError, "version 'gemv'"),
    ({"quant_method": "awq", "bits": 8}, UnsupportedModelError, "8 bits"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, UnsupportedModelError, "fmt must be e4m3"),
    ({"quant_method": "fp8", "activation_scheme": "none"}, UnsupportedModelError, "activation_scheme 'none'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, ConfigError, "two positive integers"),
    ({"quant_method": "bitsandbytes"}, UnsupportedModelError, "one of load_in_4bit and load_in_8bit"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        UnsupportedModelError,
        "'int4'",
    ),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_refused_by_name(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(values)


def test_groups_are_found_by_name_before_class() -> None:
    config = scheme("mixed-precision", **W4)
    group = config["config_groups"]["group_0"]
    group["format"] = "pack-quantized"
    eight = {
        "targets": ["re:.*self_attn.*"],
        "format": "int-quantized",
        "weights": {"num_bits": 8, "strategy": "channel"},
    }
    named = {
        "targets": ["model.layers.3.self_attn.v_proj"],
        "weights": {**W4, "group_size": 64},
        "format": "pack-quantized",
    }
    config["config_groups"] = {"a": group, "b": named, "c": eight}
    config["ignore"] = ["lm_head", "re:.*layers.0.*"]
    parsed = parse(config)
    assert describe(parsed) == "w8a16, per channel"
    assert describe(parsed, "model.layers.3.self_attn.v_proj") == "w4a16, groups of 64"
    assert describe(parsed, "model.layers.3.mlp.up_proj") == "w4a16, groups of 32"
    assert describe(parsed, "model.layers.0.mlp.up_proj") is None
    assert parsed.format_of("model.embed_tokens", "Embedding") is None


def test_inputs_that_kernels_cannot_round_so_stay_as_they_are() -> None:
    asymmetric = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False}
    assert describe(parse(scheme("int-quantized", num_bits=8, strategy="channel", inputs=asymmetric))) == (
        "w8a16, per channel"
    )
    fp8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    assert describe(parse(scheme("pack-quantized", inputs=fp8, **W4))) == "w4a16, groups of 32"


def test_gptqs_dynamic_entries_and_head() -> None:
    values = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "lm_head": True,
        "dynamic": {
            r"-:model\.layers\.0\..*": {},
            r"+:.*\.layers\.1\..*": {"bits": 8, "group_size": 64, "damp_percent": 0.1},
            r".*\.layers\.[12]\..*": {"desc_act": True, "sym": False},
        },
    }
    config = parse(values)
    assert describe(config) == "w4a16, groups of 32"
    assert describe(config, "lm_head") == "w4a16, groups of 32"
    assert describe(config, "model.layers.0.mlp.up_proj") is None
    assert describe(config, "model.layers.1.mlp.up_proj") == "w8a16, groups of 64"
    assert describe(config, "model.layers.2.mlp.up_proj") == "w4a16, groups of 32, zero points, act-order"


@pytest.mark.parametrize(
    ("entry", "layer", "is_meant"),
    [
        ("lm_head", "lm_head", True),
        ("self_attn", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("gate", "model.layers.1.mlp.gate_proj", False),
        ("mlp.gate", "model.layers.1.mlp.gate", True),
        ("model.layers.*.mlp", "model.layers.7.mlp.up_proj", True),
        (r"model\.layers\.1", "model.layers.11.mlp.up_proj", False),
        (r".*layers\.(0|1)\.mlp.*", "model.layers.1.mlp.up_proj", True),
    ],
)
def test_lists_of_modules_left_out(entry: str, layer: str, is_meant: bool) -> None:
    assert SkippedModules([entry], "here").matches(layer) == is_meant


def test_targets() -> None:
    targets = LayerTargets(["Linear", "re:.*mlp", "lm_head"], "here")
    assert targets.matches_class("Linear")
    assert not targets.matches_class("Embedding")
    assert targets.matches_name("model.layers.0.mlp.up_proj")
    assert not LayerTargets(["model.layers.0"], "here").matches_name("model.layers.0.mlp.up_proj")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(RECIPES)),
    path=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    value=JSON,
    rows=st.integers(1, 400),
    columns=st.integers(1, 400),
)
def test_any_value_in_any_place_is_understood_or_refused(
    name: str, path: list[int], value: Any, rows: int, columns: int
) -> None:
    values = _replaced(dict(RECIPES[name].config), path, value)
    try:
        config = parse_quantization(ConfigReader({"quantization_config": values}, "config.json"))
        stored = None if config is None else config.format_of(LAYER, "Linear")
        if stored is not None:
            assert stored.describe()
            assert stored.tensors(rows, columns)
    except (ConfigError, CheckpointError):
        pass


def _replaced(values: Any, path: list[int], value: Any) -> Any:
    """Returns `values` with the item that the path leads to replaced."""
    if not path or not isinstance(values, dict) or not values:
        return value
    key = list(values)[path[0] % len(values)]
    return {**values, key: _replaced(values[key], path[1:], value)}
