# SPDX-License-Identifier: Apache-2.0
"""Loading: every weight in its place, or one clear error that names the file or tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.parameter import PackedModule
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def single(checkpoints: TinyCheckpoints, tmp_path: Path) -> Path:
    """A checkpoint of one file that a test may damage."""
    return shutil.copytree(checkpoints.get("llama"), tmp_path / "single")


@pytest.fixture
def sharded(checkpoints: TinyCheckpoints, tmp_path: Path) -> Path:
    """A checkpoint of several files that a test may damage."""
    return shutil.copytree(checkpoints.get("llama", sharded=True), tmp_path / "sharded")


def load(directory: Path) -> Model:
    config = ModelConfig.load(directory)
    model = create_model(config, torch.float32, "cpu")
    load_weights(model, directory, config)
    return model


def weights(model: Model) -> list[tuple[str, torch.Tensor]]:
    """Parameters and packed weights; the kernels of these tests are the reference's, which pack nothing."""
    packed = [(name, module.packed.data) for name, module in model.named_modules() if isinstance(module, PackedModule)]
    return [*model.named_parameters(), *packed]


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}
    edit(tensors)
    save_file(tensors, directory / SINGLE)


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(directory)
    assert str(directory.parent) not in str(caught.value)


def test_merged_projections_are_stacked_in_order(single: Path) -> None:
    model, tensors = load(single), load_file(single / SINGLE)
    for merged, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        block = merged.split(".", maxsplit=1)[0]
        want = torch.cat([tensors[f"model.layers.1.{block}.{part}_proj.weight"] for part in parts])
        assert torch.equal(model.get_submodule(f"layers.1.{merged}").packed.data, want)
    assert torch.equal(model.get_submodule("lm_head").packed.data, tensors["lm_head.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_shards_hold_what_one_file_holds(checkpoints: TinyCheckpoints) -> None:
    one, many = load(checkpoints.get("llama")), load(checkpoints.get("llama", sharded=True))
    for (name, want), (_, got) in zip(weights(one), weights(many), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("sharded", [False, True])
def test_progress_counts_up_to_the_whole(checkpoints: TinyCheckpoints, sharded: bool) -> None:
    directory = checkpoints.get("llama", sharded=sharded, dtype=torch.bfloat16)
    config = ModelConfig.load(directory)
    model = create_model(config, torch.float32, "cpu")
    calls: list[tuple[int, int]] = []
    weight_bytes = load_weights(model, directory, config, progress=lambda *call: calls.append(call))
    assert weight_bytes == sum(tensor.nbytes for _, tensor in weights(model))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    # Progress counts the file's bfloat16, the result the model's float32.
    assert calls[-1] == (weight_bytes // 2, weight_bytes // 2)


def test_tied_embeddings_share_their_memory(checkpoints: TinyCheckpoints) -> None:
    model = load(checkpoints.get("llama", tied=True))
    assert [name for name, _ in weights(model) if "lm_head" in name] == []


def test_harmless_extras_are_ignored(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints.get("llama", tied=True), tmp_path / "tied")

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change(directory, edit)
    load(directory)


def test_a_head_that_contradicts_the_tie_is_refused(checkpoints: TinyCheckpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints.get("llama", tied=True), tmp_path / "tied")
    change(directory, lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 64)}))
    refuse(directory, "they differ; set tie_word_embeddings to false")
    change(directory, lambda tensors: tensors.update({"lm_head.weight": torch.ones(511, 64)}))
    refuse(directory, "they differ; set tie_word_embeddings to false")


def test_missing_tensors_are_named(single: Path) -> None:
    change(single, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.self_attn" in name])
    refuse(single, r"lacks 4 of the 21 tensors .*LlamaForCausalLM wants: model\.layers\.1\.self_attn\..* and 1 more")


def test_extra_tensors_are_named(single: Path) -> None:
    change(single, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}))
    refuse(single, r"has 1 tensors that .* does not know: model\.layers\.2\.mlp\.up_proj\.weight")


def test_a_renamed_tensor_is_named_with_what_is_there_instead(single: Path) -> None:
    change(single, lambda tensors: tensors.update({"model.final_norm.weight": tensors.pop("model.norm.weight")}))
    refuse(single, r"model\.norm\.weight; it has model\.final_norm\.weight instead")


def test_control_characters_in_names_do_not_reach_the_message(single: Path) -> None:
    change(single, lambda tensors: tensors.update({"\x1b[31mred": torch.ones(1)}))
    refuse(single, r"does not know: '\\x1b\[31mred'")


def test_misshapen_tensors_are_named_with_both_shapes(single: Path) -> None:
    change(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    refuse(single, r"model\.norm\.weight \(\[63\] instead of \[64\]\)")


def test_a_config_of_another_shape_is_refused_before_memory_is_asked_for(single: Path) -> None:
    values = json.loads((single / "config.json").read_text())
    values |= {"hidden_size": 2**16, "intermediate_size": 2**20, "head_dim": 64, "vocab_size": 2**22}
    (single / "config.json").write_text(json.dumps(values))
    refuse(single, "do not have the shape config.json implies: .*4194304, 65536")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_wrong_dtypes_are_named(single: Path, dtype: torch.dtype) -> None:
    change(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    refuse(single, r"not of the dtype .*: model\.norm\.weight \([IF]\w+ instead of F32 or F16 or BF16\)")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(single: Path, keep: int) -> None:
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:keep])
    refuse(single, r"^model\.safetensors is truncated")


def test_surplus_bytes_at_the_end_are_refused(single: Path) -> None:
    with (single / SINGLE).open("ab") as file:
        file.write(b"more")
    refuse(single, "4 bytes at its end belong to no tensor")


def test_a_git_lfs_pointer_is_told_apart(single: Path) -> None:
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(single, "Git LFS pointer.*git lfs pull")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    refuse(sharded, r"1 of 4 weight files are missing: model-00002-of-00004\.safetensors")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refuse(sharded, r"^model-00003-of-00004\.safetensors is truncated: .* download or copy it again")


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refuse(sharded, "neither model.safetensors nor model.safetensors.index.json")


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file_name",
    ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "pytorch_model.bin", ""],
)
def test_an_index_may_only_name_files_beside_it(sharded: Path, file_name: str) -> None:
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": file_name}))
    refuse(sharded, r"only \*\.safetensors files beside it are read")


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    def edit(weight_map: dict[str, str]) -> None:
        files = sorted(set(weight_map.values()))
        weight_map["model.norm.weight"] = next(file for file in files if file != weight_map["model.norm.weight"])

    edit_index(sharded, edit)
    refuse(sharded, r"names tensors that are not in their files: model\.norm\.weight")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "model-00002-of-00004.safetensors")
    refuse(sharded, "is in model-00001-of-00004.safetensors and in model-00002-of-00004.safetensors")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 200_000]
)
def test_a_broken_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refuse(sharded, r"model\.safetensors\.index\.json")


def test_pickle_files_are_never_read_and_the_message_says_what_to_do(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refuse(single, r"pickle files only \(pytorch_model\.bin\).*never read.*save_pretrained")


def test_a_directory_without_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    refuse(single, "has no weights: model.safetensors is missing")
    (single / "model.gguf").touch()
    refuse(single, "model.gguf is truncated")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_corrupt_header_loads_or_raises_checkpoint_error(
    checkpoints: TinyCheckpoints, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    directory = checkpoints.get("llama")
    content = bytearray((directory / SINGLE).read_bytes())
    for position, value in changes:
        content[position] = value
    (tmp_path / SINGLE).write_bytes(bytes(content))
    config = ModelConfig.load(directory)
    try:
        load_weights(create_model(config, torch.float32, "cpu"), tmp_path, config)
    except CheckpointError:
        return
