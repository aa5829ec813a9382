# SPDX-License-Identifier: Apache-2.0
"""Mixtures of quantized experts: held in few bits, and the tokens of the same weights dequantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fakes.gguf_files import decode, write_gguf
from fakes.hugging_face_layers import gptq
from fakes.quantized_checkpoints import RECIPES, Recipe, write_quantized
from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine import LLM, SamplingParams
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.moe import MixtureOfExperts
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.moe import QuantizedExperts

SINGLE = "model.safetensors"
PROMPTS = [[5, 9, 300, 17, 44, 12], [3, 4], list(range(40, 80))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# Rows that groups of 32 and words of 8 values fit.
SIZES = {"mixtral": {}, "qwen3-moe": {"moe_intermediate_size": 64}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVETRAIN_KERNELS", "reference")
    monkeypatch.setattr(dispatch, "_CHOSEN", {})


def greedy_tokens(model: Path, dtype: str = "float32") -> list[list[int]]:
    with LLM(str(model), dtype=dtype, num_blocks=64, max_model_len=256) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def load(directory: Path) -> tuple[Model, int]:
    config = ModelConfig.load(directory)
    model = create_model(config, torch.float32, "cpu")
    return model, load_weights(model, directory, config)


def expert_bytes(model: Model) -> int:
    """What is really held."""
    total = 0
    for mixture in model.modules():
        if isinstance(mixture, MixtureOfExperts):
            for stack in (mixture.gate_up, mixture.down):
                data = stack.packed.data
                held = [data] if isinstance(data, Tensor) else data.weights
                total += sum(item.nbytes if isinstance(item, Tensor) else item.num_bytes for item in held)
    return total


def schemes(model: Model) -> set[bool]:
    stacks = [
        stack
        for module in model.modules()
        if isinstance(module, MixtureOfExperts)
        for stack in (module.gate_up, module.down)
    ]
    return {isinstance(stack.packed.data, QuantizedExperts) for stack in stacks}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "gptq"),
        ("mixtral", "gptq-act-order"),
        ("mixtral", "w8a8-static"),
        ("mixtral", "bnb-nf4"),
        ("qwen3-moe", "w4a16-g16-asym"),
        ("qwen3-moe", "awq"),
        ("qwen3-moe", "fp8"),
        ("qwen3-moe", "fp8-hf-block-32"),
    ],
)
def test_tokens_are_those_of_the_dequantized_model(
    checkpoints: TinyCheckpoints, tmp_path: Path, family: str, name: str
) -> None:
    recipe = RECIPES[name]
    quantized, dequantized = write_quantized(checkpoints.get(family, **SIZES[family]), tmp_path, recipe)
    model, num_bytes = load(quantized)
    dense, num_dense_bytes = load(dequantized)
    assert schemes(model) == {True}
    assert schemes(dense) == {False}
    assert expert_bytes(model) < expert_bytes(dense) / 2
    assert num_dense_bytes - num_bytes >= expert_bytes(dense) - expert_bytes(model)
    if recipe.inputs is None:  # rounded inputs have tests of their own, beside transformers
        assert greedy_tokens(quantized) == greedy_tokens(dequantized)


@pytest.mark.parametrize(("family", "name"), [("mixtral", "w8a8-static"), ("qwen3-moe", "w4a16-g16-asym")])
def test_the_kernels_of_this_machine_serve_them(
    checkpoints: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    quantized, _ = write_quantized(checkpoints.get(family, **SIZES[family]), tmp_path, RECIPES[name])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for kernels, dtype in (("reference", "float32"), ("auto", "bfloat16")):
        monkeypatch.setenv("WAVETRAIN_KERNELS", kernels)
        with LLM(str(quantized), dtype=dtype, num_blocks=64, max_model_len=256) as llm:
            output = llm.generate(PROMPTS[2:], params)[0]
        entries = [entry for entry in output.prompt_logprobs or [] if entry is not None]
        tokens = PROMPTS[2][1:]
        found.append(torch.tensor([entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]))
    difference = (found[0] - found[1]).abs().mean()
    assert difference < 0.15, difference


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize(("kind", "kinds"), [("Q4_0", {"ffn_down_exps": "Q8_0"}), ("Q8_0", {})])
def test_stacks_of_gguf_files(
    checkpoints: TinyCheckpoints, tmp_path: Path, family: str, kind: str, kinds: dict[str, str]
) -> None:
    directory = checkpoints.get(family, **SIZES[family])
    path = write_gguf(directory, tmp_path / "x.gguf", kind=kind, kinds={**kinds, "token_embd": "F32", "output": "F32"})
    names = {"w2": "ffn_down_exps", "down_proj": "ffn_down_exps"}
    tensors = load_file(directory / SINGLE)
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if tensor.dim() == 2 and module not in ("embed_tokens", "lm_head", "gate"):
            wanted = kinds.get(names.get(module, module), kind)
            tensors[name] = torch.from_numpy(decode(tensor.float().numpy(), wanted).copy())
    dequantized = tmp_path / "dequantized"
    dequantized.mkdir()
    for file in directory.iterdir():
        (dequantized / file.name).write_bytes(file.read_bytes())
    save_file(tensors, dequantized / SINGLE, {"format": "pt"})
    model, _ = load(path)
    assert schemes(model) == {True}
    assert expert_bytes(model) < expert_bytes(load(dequantized)[0]) / 2
    assert greedy_tokens(path) == greedy_tokens(dequantized)


def test_experts_of_different_schemes_are_held_unquantized(
    checkpoints: TinyCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One expert of the first projections has 8 bits; the second ones stay as they are."""
    w8 = RECIPES["w8a16-g32"]
    groups = {
        name: {**recipe.config["config_groups"]["group_0"], "targets": targets}
        for name, recipe, targets in (
            ("w4", RECIPES["w4a16-g32"], ["Linear"]),
            ("w8", w8, ["re:.*experts[.]3[.]w[13]"]),
        )
    }
    recipe = replace(RECIPES["w4a16-g32"], config={**RECIPES["w4a16-g32"].config, "config_groups": groups})
    special: dict[str, Recipe] = {f"experts.3.{part}": w8 for part in ("w1", "w3")}
    quantized, dequantized = write_quantized(checkpoints.get("mixtral"), tmp_path, recipe, per_layer=special)
    with caplog.at_level("WARNING"):
        model, _ = load(quantized)
    assert "the experts of 2 projections are held unquantized: they are quantized in different ways" in caplog.text
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    assert all(isinstance(mixture.gate_up.packed.data, Tensor) for mixture in mixtures)
    assert all(isinstance(mixture.down.packed.data, QuantizedExperts) for mixture in mixtures)
    assert greedy_tokens(quantized) == greedy_tokens(dequantized)


def other_order(seed: int) -> Recipe:
    return replace(RECIPES["gptq-act-order"], store=gptq(4, 16, is_symmetric=False, order_seed=seed, version=2))


def test_gates_of_another_order_than_what_they_gate(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    """Such parts are no weight that rows are multiplied with; so, if the first expert has them, none is quantized."""
    source, recipe = checkpoints.get("mixtral"), RECIPES["gptq-act-order"]
    quantized, dequantized = write_quantized(source, tmp_path, recipe, per_layer={"w1": other_order(17)})
    assert schemes(load(quantized)[0]) == {True, False}
    assert greedy_tokens(quantized) == greedy_tokens(dequantized)


def test_an_expert_unlike_the_first_is_named(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    source, recipe = checkpoints.get("mixtral"), RECIPES["gptq-act-order"]
    quantized, _ = write_quantized(
        source, tmp_path, recipe, per_layer={"layers.1.block_sparse_moe.experts.3.w1": other_order(17)}
    )
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w1.*not quantized as the first"
    ):
        load(quantized)
