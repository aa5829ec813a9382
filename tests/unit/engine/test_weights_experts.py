# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts are loaded whole from every form of checkpoint, or refused by the name of what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.moe import ExpertProjection, MixtureOfExperts
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights
from wavetrain_kernels.ops import dispatch

SINGLE = "model.safetensors"
FAMILIES = ["mixtral", "qwen3-moe", "qwen3-moe-mixed"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose packed experts are the weights, side by side."""
    monkeypatch.setattr(dispatch, "_CHOSEN", {})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Model:
    config = ModelConfig.load(directory)
    model = create_model(config, dtype, "cpu")
    load_weights(model, directory, config)
    return model


def mixtures(model: Model) -> dict[str, MixtureOfExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def weights(model: Model) -> Tensors:
    found = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, mixture in mixtures(model).items():
        found[f"{name}.gate_up"], found[f"{name}.down"] = mixture.gate_up.packed.data, mixture.down.packed.data
        found[f"{name}.gate"] = mixture.gate.packed.data
    return found


def stacked(source: Path, directory: Path, **options: str) -> Path:
    """The same model as transformers 5 saves what it has in memory."""
    shutil.copytree(source, directory)
    (directory / SINGLE).unlink()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(directory, save_original_format=False, **options)
    return directory


@pytest.fixture
def damaged(checkpoints: TinyCheckpoints, tmp_path: Path) -> Path:
    """Stacks of Mixtral's experts in one file that a test may change."""
    return stacked(checkpoints.get("mixtral"), tmp_path / "damaged")


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE)


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(directory)
    assert str(directory.parent) not in str(caught.value)


def test_every_expert_is_in_its_place(checkpoints: TinyCheckpoints) -> None:
    directory = checkpoints.get("mixtral")
    tensors, mixture = load_file(directory / SINGLE), mixtures(load(directory))["layers.1.block_sparse_moe"]
    prefix = "model.layers.1.block_sparse_moe"
    assert torch.equal(mixture.gate.packed.data, tensors[f"{prefix}.gate.weight"])
    for expert in range(5):
        gate, up, down = (tensors[f"{prefix}.experts.{expert}.w{number}.weight"] for number in (1, 3, 2))
        assert torch.equal(mixture.gate_up.packed.data[expert], torch.cat((gate, up)))
        assert torch.equal(mixture.down.packed.data[expert], down)


def test_only_some_layers_have_experts(checkpoints: TinyCheckpoints) -> None:
    assert list(mixtures(load(checkpoints.get("qwen3-moe-mixed")))) == ["layers.1.mlp"]
    assert list(mixtures(load(checkpoints.get("qwen3-moe")))) == ["layers.0.mlp", "layers.1.mlp"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_stacks_hold_what_single_experts_do(
    checkpoints: TinyCheckpoints, tmp_path: Path, family: str, size: str
) -> None:
    directory = stacked(checkpoints.get(family), tmp_path / family, max_shard_size=size)
    assert (directory / SINGLE).exists() == (size == "1GB")
    got, want = weights(load(directory)), weights(load(checkpoints.get(family)))
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_experts_in_shards_and_in_another_type(checkpoints: TinyCheckpoints) -> None:
    one, many = load(checkpoints.get("mixtral")), load(checkpoints.get("mixtral", sharded=True))
    assert all(map(torch.equal, weights(many).values(), weights(one).values()))
    half = load(checkpoints.get("mixtral"), torch.bfloat16)
    for name, weight in weights(half).items():
        assert torch.equal(weight, weights(one)[name].bfloat16()), name


def test_loaded_experts_are_held_once(checkpoints: TinyCheckpoints) -> None:
    model = load(checkpoints.get("mixtral"))
    assert not any(list(module.parameters()) for module in model.modules() if isinstance(module, ExpertProjection))


def test_a_missing_expert_is_named(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints.get("qwen3-moe"), tmp_path / "qwen3-moe")
    change(directory, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    refuse(directory, r"lacks 1 of the .* wants: model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight$")


def test_an_expert_too_many_is_named(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints.get("mixtral"), tmp_path / "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    change(directory, lambda tensors: tensors.update({name.format(5): tensors[name.format(4)].clone()}))
    refuse(directory, r"does not know: model\.layers\.0\.block_sparse_moe\.experts\.5\.w1\.weight")


def test_an_expert_of_another_shape_is_named(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints.get("mixtral"), tmp_path / "mixtral")
    change(directory, lambda t: t.update({"model.layers.0.block_sparse_moe.experts.2.w2.weight": torch.ones(96, 64)}))
    refuse(directory, r"experts\.2\.w2\.weight \(\[96, 64\] instead of \[64, 96\]\)")


@pytest.mark.parametrize("shape", [(4, 192, 64), (5, 191, 64), (5, 64, 192), (5 * 192, 64), (5, 192, 64, 1), ()])
def test_a_stack_of_another_shape_is_named(damaged: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    change(damaged, lambda tensors: tensors.update({name: torch.ones(shape)}))
    refuse(damaged, r"model\.layers\.1\.mlp\.experts\.gate_up_proj \(.* instead of \[5, 192, 64\]\)")


def test_a_missing_stack_is_named_by_its_experts(damaged: Path) -> None:
    change(damaged, lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj"))
    refuse(damaged, r"lacks 5 of the .* wants: model\.layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight")


def test_an_expert_that_is_there_twice_is_named(damaged: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    change(damaged, lambda tensors: tensors.update({name: torch.ones(64, 96)}))
    refuse(damaged, r"experts\.3\.w2\.weight twice: alone and in a stack of all experts")


def test_a_stack_of_unsupported_type_is_named(damaged: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    change(damaged, lambda tensors: tensors.update({name: torch.ones(5, 64, 96).to(torch.float8_e4m3fn)}))
    refuse(damaged, r"not of the dtype .* \S+experts\.0\.w2\.weight \(F8_E4M3 instead")


def test_stacks_are_no_tensors_of_other_families(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints.get("llama"), tmp_path / "llama")
    change(directory, lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.ones(5, 64, 96)}))
    refuse(directory, r"does not know: model\.layers\.0\.mlp\.experts\.down_proj")
