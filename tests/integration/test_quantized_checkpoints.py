# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of every format against transformers over the same weights, dequantized."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fakes.compressed_layers import INPUT_SCALE, packed
from fakes.hugging_face_layers import gptq
from fakes.quantized_checkpoints import RECIPES, SINGLE, Recipe, change_config, write_quantized
from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine import LLM, SamplingParams
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights

NUM_OUTPUT_TOKENS = 8
PROMPT_LENS = (3, 40)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # What other kernels make of a scheme is for their own tests.
    monkeypatch.setenv("WAVETRAIN_KERNELS", "reference")


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in PROMPT_LENS]


def round_inputs(x: Tensor, how: str) -> Tensor:
    """Rounds rows of inputs as the formats have it."""
    largest = 127.0 if how.startswith("int8") else 448.0
    suffix = how.rpartition("-")[2]
    size = int(suffix) if suffix.isdigit() else x.shape[-1]
    wide = nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    scales = wide.abs().amax(-1, keepdim=True) / largest
    if how.endswith("-static"):
        scales = torch.full_like(scales, INPUT_SCALE)
    scaled = (wide / scales.where(scales > 0, 1.0)).clamp(-largest, largest)
    rounded = scaled.round() if how.startswith("int8") else scaled.to(torch.float8_e4m3fn).float()
    return (rounded * scales).flatten(-2)[..., : x.shape[-1]]


@torch.inference_mode()
def ask_transformers(directory: Path, recipe: Recipe) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the greedy tokens and the log-probabilities of the prompts' own tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    if recipe.inputs is not None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not any(part in name for part in recipe.skipped):
                module.register_forward_pre_hook(lambda _, args: (round_inputs(args[0], recipe.inputs or ""),))
    tokens, logprobs = [], []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, pad_token_id=2
        )
        tokens.append(output[0, len(prompt) :].tolist())
        scores = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
        logprobs.append(scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return tokens, logprobs


def ask_engine(directory: Path, **flags: Any) -> tuple[list[list[int]], list[list[float]]]:
    """The same of ours."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, prompt_logprobs=1)
    with LLM(model=str(directory), **flags) as llm:
        outputs = llm.generate(prompts(), params)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [entry[token].logprob for entry, token in zip((output.prompt_logprobs or [])[1:], prompt[1:], strict=True)]
        for output, prompt in zip(outputs, prompts(), strict=True)
    ]
    return tokens, logprobs


def assert_equal(quantized: Path, dequantized: Path, recipe: Recipe, **flags: Any) -> None:
    want_tokens, want_logprobs = ask_transformers(dequantized, recipe)
    tokens, logprobs = ask_engine(quantized, **flags)
    # Where inputs are rounded, a sum in another order may round to the next step.
    tolerance = 2e-4 if recipe.inputs is None else 0.2
    for found, want in zip(logprobs, want_logprobs, strict=True):
        assert found == pytest.approx(want, abs=tolerance)
    if recipe.inputs is None:
        assert tokens == want_tokens


@pytest.mark.parametrize("name", RECIPES)
def test_every_format_equals_transformers(checkpoints: TinyCheckpoints, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, recipe)
    assert_equal(quantized, dequantized, recipe)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("w4a16-g32", "int8-32"), ("gptq-asym", "int8-32"), ("w8a16-channel-asym", "int8-128"), ("fp8-hf-block-32", None)],
)
def test_inputs_in_int8_where_the_checkpoint_does_not_say_so(
    checkpoints: TinyCheckpoints, tmp_path: Path, name: str, inputs: str | None
) -> None:
    """Of weights in integers; each token's, in the groups of the weight."""
    recipe = RECIPES[name] if inputs is None else replace(RECIPES[name], inputs=inputs)
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, recipe)
    assert_equal(quantized, dequantized, recipe, activation_dtype="int8")
    if inputs is not None:
        assert ask_engine(quantized, activation_dtype="int8")[1] != ask_engine(quantized)[1]


W4, W8 = RECIPES["w4a16-g32"], RECIPES["w8a16-g32"]


def config_of_two(parts: dict[str, list[str]]) -> dict[str, Any]:
    """Returns a config with groups for w4 and w8; `parts` says what each one's targets are."""
    config = copy.deepcopy(dict(W4.config))
    groups = {
        name: copy.deepcopy(recipe.config["config_groups"]["group_0"]) for name, recipe in (("w4", W4), ("w8", W8))
    }
    config["config_groups"] = {name: {**groups[name], "targets": targets} for name, targets in parts.items()}
    return config


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_parts_of_different_schemes_are_computed_one_by_one(
    checkpoints: TinyCheckpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kernels: str,
) -> None:
    monkeypatch.setenv("WAVETRAIN_KERNELS", kernels)
    # v and up are of 8 bits, k is not quantized, in a model with biases everywhere.
    config = config_of_two({"w4": ["Linear"], "w8": ["re:.*[.](v|up)_proj"]})
    config["ignore"] = ["lm_head", "re:.*k_proj"]
    recipe = replace(W4, config=config, skipped=("lm_head", "k_proj"))
    source = checkpoints.get("llama-bias")
    quantized, dequantized = write_quantized(source, tmp_path, recipe, per_layer={"v_proj": W8, "up_proj": W8})
    with caplog.at_level("INFO"):
        assert_equal(quantized, dequantized, recipe)
    assert "4 merged projections have parts of different schemes" in caplog.text
    assert (
        "quantized weights: compressed-tensors w4a16, groups of 32 (8 weights); w8a16, groups of 32 (4" in caplog.text
    )


@pytest.mark.parametrize("name", ["w4a16-act-order", "gptq-act-order"])
def test_act_orders_that_differ_by_part(checkpoints: TinyCheckpoints, tmp_path: Path, name: str) -> None:
    make, options = (packed, {}) if name.startswith("w4") else (gptq, {"version": 2})
    other = replace(RECIPES[name], store=make(4, 16, is_symmetric=False, order_seed=17, **options))
    quantized, dequantized = write_quantized(
        checkpoints.get("llama"), tmp_path, RECIPES[name], per_layer={"k_proj": other, "gate_proj": other}
    )
    assert_equal(quantized, dequantized, RECIPES[name])


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen2", "gptq-asym"), ("gemma2", "w4a16-g16-asym"), ("mixtral", "fp8-hf-block-32"), ("qwen3-moe", "awq")],
)
def test_other_families(checkpoints: TinyCheckpoints, tmp_path: Path, family: str, name: str) -> None:
    options = {"moe_intermediate_size": 64} if family == "qwen3-moe" else {}
    quantized, dequantized = write_quantized(checkpoints.get(family, **options), tmp_path, RECIPES[name])
    assert_equal(quantized, dequantized, RECIPES[name])


@pytest.mark.parametrize("name", ["w8a16-channel-asym", "gptq"])
def test_a_quantized_output_head(checkpoints: TinyCheckpoints, tmp_path: Path, name: str) -> None:
    config = {**RECIPES[name].config, **({"lm_head": True} if name == "gptq" else {"ignore": []})}
    recipe = replace(RECIPES[name], config=config, skipped=())
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, recipe)
    assert_equal(quantized, dequantized, recipe)


def test_a_quantized_embedding_is_held_as_numbers(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    config = config_of_two({"w4": ["Linear"], "w8": ["Embedding"]})
    recipe = replace(W4, config=config, extra=("embed_tokens",))
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, recipe, per_layer={"embed_tokens": W8})
    assert_equal(quantized, dequantized, recipe)


def test_scales_of_a_kv_cache_are_not_needed(
    checkpoints: TinyCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = RECIPES["fp8-hf-block-32"]
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, recipe)
    tensors = load_file(quantized / SINGLE)
    for layer in range(2):
        for name in ("self_attn.k_scale", "self_attn.v_scale", "self_attn.k_proj.output_scale"):
            tensors[f"model.layers.{layer}.{name}"] = torch.ones(1)
    save_file(tensors, quantized / SINGLE)
    with caplog.at_level("INFO"):
        assert_equal(quantized, dequantized, recipe)
    assert "scales for a KV cache are not needed" in caplog.text


def test_weights_take_the_bytes_they_are_packed_in(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, W4)

    def weight_bytes(directory: Path) -> int:
        config = ModelConfig.load(directory)
        return load_weights(create_model(config, torch.float32, "cpu"), directory, config)

    linear = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    assert weight_bytes(dequantized) - weight_bytes(quantized) == linear * 4 - linear // 2 - linear // 32 * 4


@pytest.mark.parametrize("name", ["w4a16-act-order", "w8a8-static", "gptq", "awq", "fp8-hf-block-32", "bnb-nf4-nested"])
def test_a_tensor_that_is_missing_or_of_another_form_is_named(
    checkpoints: TinyCheckpoints, tmp_path: Path, name: str
) -> None:
    directory, _ = write_quantized(checkpoints.get("llama"), tmp_path, RECIPES[name])
    config, tensors = ModelConfig.load(directory), load_file(directory / SINGLE)
    layer = "model.layers.1.mlp.down_proj"
    # Every one but the order of groups that are in order.
    names = [item for item in tensors if item.startswith(layer) and not (name == "gptq" and item.endswith("g_idx"))]
    assert len(names) > 1
    for item in names:
        damaged = {
            "lacks": {other: tensor for other, tensor in tensors.items() if other != item},
            "shape": {**tensors, item: tensors[item].new_zeros((3, 5, 7))},
            "dtype": {**tensors, item: tensors[item].to(torch.float64)},
        }
        for kind, content in damaged.items():
            save_file(content, directory / SINGLE)
            with pytest.raises(CheckpointError, match=f"{kind}.*{re.escape(item)}|does not know.*{re.escape(layer)}"):
                load_weights(create_model(config, torch.float32, "cpu"), directory, config)


def test_a_wrong_group_size_is_refused(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    for name, key in (("gptq", "group_size"), ("awq", "group_size")):
        directory, _ = write_quantized(checkpoints.get("llama"), tmp_path / name, RECIPES[name])
        change_config(directory, lambda values, key=key: values.update({key: 16}))
        config = ModelConfig.load(directory)
        with pytest.raises(CheckpointError, match=r"shape config.json implies: .*scales \(\[2, "):
            load_weights(create_model(config, torch.float32, "cpu"), directory, config)
