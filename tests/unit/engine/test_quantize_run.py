# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny models: what is written, what is refused before any work, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import CheckpointError, ConfigError, WavetrainError
from wavetrain_engine.quantizer import quantizer as quantizer_module
from wavetrain_engine.quantizer.quantizer import QuantizerJob, quantize
from wavetrain_engine.quantizer.recipe import SCHEMES, Recipe
from wavetrain_engine.quantizer.report import Report
from wavetrain_engine.quantizer.work_folder import WorkFolder

ENVIRONMENT = Environment.read({"WAVETRAIN_KERNELS": "reference", "WAVETRAIN_CACHE_DIR": "/nowhere"})
EVERY_RECIPE = [(scheme.name, method) for scheme in SCHEMES.values() for method in scheme.methods]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def recipe(scheme: str = "w4a16", method: str = "rtn", **values: Any) -> Recipe:
    defaults = {"num_windows": 6, "window_tokens": 48, "num_report_windows": 0}
    return Recipe(scheme=scheme, method=method, **(defaults | values))


def ignore_progress(_phase: str, _done: int, _total: int) -> None:
    pass


def run(
    model_dir: Path,
    out: Path,
    wanted: Recipe,
    calibration: Path | None = None,
    *,
    progress: Callable[[str, int, int], None] = ignore_progress,
    restarts: bool = False,
) -> Report:
    job = QuantizerJob(model_dir=model_dir, out=out, recipe=wanted, calibration=calibration, restarts=restarts)
    return quantize(job, ENVIRONMENT, progress)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Integers of words, element by element."""
    numbers = [
        [((int(row[at * bits // 32]) & 0xFFFFFFFF) >> (at * bits % 32)) & ((1 << bits) - 1) for at in range(columns)]
        for row in words
    ]
    return torch.tensor(numbers) - (1 << (bits - 1))


def dequantized(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """A matrix of a checkpoint, by the format's definition."""
    scale = tensors[f"{name}.weight_scale"].float()
    if f"{name}.weight" in tensors:
        values = tensors[f"{name}.weight"].float()
        rows = scale.repeat_interleave(128, 0)[: values.shape[0]] if scale.shape[0] < values.shape[0] else scale
    else:
        shape = tensors[f"{name}.weight_shape"].tolist()
        values, rows = unpacked(tensors[f"{name}.weight_packed"], bits, shape[1]).float(), scale
    width = values.shape[1] // scale.shape[1] if scale.shape[1] > 1 else values.shape[1]
    zero_point = tensors.get(f"{name}.weight_zero_point")
    if zero_point is not None:
        zeros = unpacked(zero_point.t(), bits, values.shape[0]).t()
        values = values - zeros.repeat_interleave(width, 1)
    return values * rows.repeat_interleave(width, 1)[:, : values.shape[1]]


@pytest.mark.parametrize(("scheme", "method"), EVERY_RECIPE)
def test_every_scheme_and_method_writes_a_complete_checkpoint(checkpoints, text, tmp_path, scheme, method):
    model_dir, out = checkpoints.get("llama"), tmp_path / "out"
    run(model_dir, out, recipe(scheme, method), text)
    before, after = tensors_of(model_dir), tensors_of(out)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in model_dir.iterdir()} | {"report.json", "report.svg"}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    quantization = config.pop("quantization_config")
    assert config == json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["ignore"] == ["lm_head"]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])
    folds = method in ("awq", "smoothquant")
    bits = quantization["config_groups"]["group_0"]["weights"]["num_bits"]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight, rounded = before[f"{name}.weight"], dequantized(after, name, bits)
        limit = {2: 0.35, 4: 0.02, 8: 0.002}[bits]
        if not folds:  # else the inputs are scaled too
            assert (rounded - weight).square().sum() < limit * weight.square().sum()


def test_the_report_is_measured_on_the_checkpoint(checkpoints, text, tmp_path):
    out, seen = tmp_path / "out", []
    wanted = recipe("w8a16", "rtn", num_report_windows=3)
    report = run(checkpoints.get("llama"), out, wanted, text, progress=lambda *update: seen.append(update))
    assert report.comparison is not None
    assert report.comparison.num_tokens == 3 * 47
    assert 0.98 < report.comparison.perplexity_ratio < 1.02
    assert 0 <= report.comparison.kl_divergence < 0.01
    assert report.comparison.top1_agreement > 0.9
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert written == report.to_mapping()
    assert written["held_out"]["perplexity"] == report.comparison.perplexity
    assert written["size"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert len(written["layers"]) == 2
    assert all(matrix["output_error"] < 1e-3 for layer in written["layers"] for matrix in layer["matrices"])
    assert (out / "report.svg").read_text(encoding="utf-8").startswith("<svg")
    assert {phase for phase, _, _ in seen} == {"layers", "writing", "measuring"}
    assert all(done <= total for _, done, total in seen)
    assert [line for line in report.lines() if "perplexity on 141 held-out tokens" in line]


DENSE = ("llama-bias", "mistral", "qwen2", "qwen3", "gemma2")
MIXTURES = ("mixtral", "qwen3-moe", "qwen3-moe-mixed")


@pytest.mark.parametrize(
    ("family", "scheme", "method"),
    [
        *((family, "w8a16", "gptq") for family in DENSE + MIXTURES),
        *((family, "w8a8", "smoothquant") for family in DENSE + MIXTURES),
        *((family, "w8a16", "awq") for family in ("gemma2", "mixtral")),
    ],
)
def test_every_family_is_nearly_itself_in_eight_bits(checkpoints, text, tmp_path, family, scheme, method):
    model_dir, out = checkpoints.get(family), tmp_path / "out"
    report = run(model_dir, out, recipe(scheme, method, num_report_windows=2), text)
    assert report.comparison is not None
    assert report.comparison.kl_divergence < 0.03
    assert 0.95 < report.comparison.perplexity_ratio < 1.05
    assert any(name.endswith(".gate") for name in report.ignored) == (family in MIXTURES)
    assert report.ignored[0] == "lm_head"


def test_experts_that_nobody_asked_are_told_of(checkpoints, text, tmp_path):
    wanted = recipe("w4a16", "gptq", num_windows=1, window_tokens=16)
    report = run(checkpoints.get("qwen3-moe", num_experts=64, num_experts_per_tok=1), tmp_path / "out", wanted, text)
    unseen = [name for layer in report.layers for name in layer["unseen"]]
    assert len(unseen) >= 2 * (64 - 16)
    assert any("rounded without text" in line for line in report.lines())


def test_zero_points_are_packed_down_the_outputs(checkpoints, tmp_path):
    model_dir, out = checkpoints.get("llama"), tmp_path / "out"
    run(model_dir, out, recipe("w4a16", is_symmetric=False))
    before, after = tensors_of(model_dir), tensors_of(out)
    name = "model.layers.0.self_attn.k_proj"
    assert after[f"{name}.weight_zero_point"].shape == (32 * 4 // 32, 2)
    error = dequantized(after, name, 4) - before[f"{name}.weight"]
    assert error.square().sum() < 0.012 * before[f"{name}.weight"].square().sum()


def test_kv_scales_cover_what_the_text_needs(checkpoints, text, tmp_path):
    out = tmp_path / "out"
    run(checkpoints.get("llama"), out, recipe("w8a8", "rtn", has_kv_scales=True), text)
    tensors = tensors_of(out)
    for layer in range(2):
        for name in ("k_scale", "v_scale"):
            scale = tensors[f"model.layers.{layer}.self_attn.{name}"]
            assert scale.shape == (1,)
            assert 0 < scale.item() < 1
    scheme = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")


def test_shards_hold_what_one_file_holds(checkpoints, tmp_path):
    model_dir = checkpoints.get("llama", sharded=True)
    run(model_dir, tmp_path / "one", recipe())
    run(model_dir, tmp_path / "many", recipe(max_shard_bytes=100_000))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for name, file_name in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file_name, framework="pt") as file:
            assert name in set(file.keys())


class Interruption(Exception):
    pass


@pytest.mark.parametrize(("family", "method"), [("llama", "gptq"), ("llama", "awq"), ("mixtral", "gptq")])
def test_going_on_gives_the_same_bytes_as_never_stopping(checkpoints, text, tmp_path, family, method):
    model_dir = checkpoints.get(family, num_hidden_layers=3)
    wanted = recipe("w4a16", method, num_report_windows=1)
    run(model_dir, tmp_path / "whole", wanted, text)

    def stop_before(layer: int) -> Callable[[str, int, int], None]:
        def progress(phase: str, done: int, _total: int) -> None:
            if phase == "layers" and done == layer:
                raise Interruption

        return progress

    out = tmp_path / "pieces"
    for layer in (1, 2, 3):
        with pytest.raises(Interruption):
            run(model_dir, out, wanted, text, progress=stop_before(layer))
        assert not out.exists()
    started: list[int] = []
    run(
        model_dir,
        out,
        wanted,
        text,
        progress=lambda phase, done, _: started.append(done) if phase == "layers" else None,
    )
    assert started == [3]
    files = {path.name for path in out.iterdir()} - {"report.json", "report.svg"}
    assert files
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not WorkFolder.beside(out).path.exists()


def test_a_run_with_other_inputs_does_not_go_on_with_these(checkpoints, text, tmp_path):
    model_dir, out = checkpoints.get("llama"), tmp_path / "out"

    def stop(phase: str, done: int, _total: int) -> None:
        if done == 1:
            raise Interruption

    with pytest.raises(Interruption):
        run(model_dir, out, recipe(method="awq"), text, progress=stop)
    with pytest.raises(ConfigError, match=r"unfinished run with other inputs \(recipe\).*--restart"):
        run(model_dir, out, recipe(method="gptq"), text)
    run(model_dir, out, recipe(method="gptq"), text, restarts=True)
    assert out.is_dir()


def test_a_layer_cut_off_in_the_middle_is_done_again(checkpoints, text, tmp_path):
    model_dir, out = checkpoints.get("llama"), tmp_path / "out"

    def stop(phase: str, done: int, _total: int) -> None:
        if phase == "layers" and done == 1:
            raise Interruption

    with pytest.raises(Interruption):
        run(model_dir, out, recipe(method="gptq"), text, progress=stop)
    work = WorkFolder.beside(out).path
    # As if it had been killed while layer 1 was written.
    (work / "layer-00001.partial").write_bytes(b"half")
    (work / "hidden-2.calibration.partial").write_bytes(b"half")
    run(model_dir, out, recipe(method="gptq"), text)
    run(model_dir, tmp_path / "whole", recipe(method="gptq"), text)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def refused(kind: type[WavetrainError], message: str, model_dir: Path, out: Path, *arguments: Any) -> None:
    def progress(*_: object) -> None:
        raise AssertionError("work was begun")

    with pytest.raises(kind, match=message):
        run(model_dir, out, *arguments, progress=progress)
    assert not WorkFolder.beside(out).path.exists()


def test_what_cannot_be_done_is_refused_before_any_work(checkpoints, text, tmp_path, monkeypatch):
    model_dir, out = checkpoints.get("llama"), tmp_path / "out"
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "something").touch()
    file.touch()
    refused(ConfigError, "not empty", model_dir, full, recipe())
    refused(ConfigError, "a file of this name", model_dir, file, recipe())
    refused(ConfigError, "the model itself", model_dir, model_dir, recipe())
    refused(ConfigError, "longer than the 512 tokens", model_dir, out, recipe(window_tokens=513), text)
    refused(ConfigError, "does not divide the 96 inputs of model.layers.0", model_dir, out, recipe(group_size=64), text)
    calibrated = recipe(method="gptq")
    refused(ConfigError, "No such file", model_dir, out, calibrated, tmp_path / "missing.txt")
    refused(ConfigError, "empty", model_dir, out, calibrated, file)
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("too short", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    refused(ConfigError, "less than one window", model_dir, out, calibrated, short)
    refused(ConfigError, "not UTF-8", model_dir, out, calibrated, binary)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(quantizer_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(ConfigError, "GiB are needed", model_dir, out, recipe())


def test_models_that_cannot_be_quantized_are_refused(checkpoints, tmp_path):
    out = tmp_path / "out"
    refused(CheckpointError, "there is no checkpoint", tmp_path / "missing", out, recipe())
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(CheckpointError, "config.json", empty, out, recipe())
    run(checkpoints.get("llama"), tmp_path / "quantized", recipe())
    refused(CheckpointError, "quantized already .compressed-tensors", tmp_path / "quantized", out, recipe())
    bare = checkpoints.get("llama", with_tokenizer=False)
    refused(CheckpointError, "tokenizer.json", bare, out, recipe(method="gptq"))
    run(bare, tmp_path / "from-bare", recipe())  # no text is needed
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoints.get("llama", vocab_size=300), foreign)
    shutil.copyfile(checkpoints.get("llama") / "tokenizer.json", foreign / "tokenizer.json")
    refused(CheckpointError, "do not belong together", foreign, out, recipe(method="gptq"), Path(__file__))


def test_text_that_every_machine_has_is_split_by_file(checkpoints, tmp_path):
    wanted = recipe("w4a16", "gptq", num_windows=4, num_report_windows=2)
    first = run(checkpoints.get("llama"), tmp_path / "first", wanted)
    assert first.comparison is not None
    assert first.comparison.num_tokens == 2 * 47
