# SPDX-License-Identifier: Apache-2.0
"""`wavetrain quantize` as a person runs it: its result served by the engine, Ctrl-C, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_cli.main import main
from wavetrain_engine import LLM, SamplingParams
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.quantizer.work_folder import WorkFolder
from wavetrain_engine.weights.checkpoint import Checkpoint
from wavetrain_engine.weights.expert_stacks import unstack_experts
from wavetrain_engine.weights.name_map import name_map
from wavetrain_engine.weights.tensor_reader import TensorReader
from wavetrain_engine.weights.weight_plan import plan_weights

SMALL = ["--calibration-windows", "4", "--window-tokens", "32", "--report-windows", "1", "--calibration", __file__]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WAVETRAIN_KERNELS", "reference")
    monkeypatch.setenv("WAVETRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVETRAIN_LOG_LEVEL", raising=False)


def write_dequantized(quantized: Path, original: Path, target: Path) -> Path:
    """Writes what a quantized checkpoint stands for as one that is not quantized."""
    config = ModelConfig.load(quantized)
    model = create_model(config, torch.float32, "cpu")
    targets = name_map(model)
    weights = plan_weights(unstack_experts(Checkpoint.open(quantized).tensors, model), targets, config)
    tensors = {name: torch.empty(item.shape) for name, item in targets.items()}
    for name, tensor in tensors.items():
        weights[name].read(TensorReader(), tensor)
    target.mkdir()
    for path in original.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_bytes(path.read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


def logprobs(directory: Path) -> list[float]:
    prompt = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(7)).tolist()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    with LLM(model=str(directory)) as llm:
        output = llm.generate([prompt], params)[0]
    return [entry[token].logprob for entry, token in zip((output.prompt_logprobs or [])[1:], prompt[1:], strict=True)]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama-bias", ["--scheme", "w4a16", "--method", "gptq", "--asymmetric", "--kv-scales"]),
        ("gemma2", ["--scheme", "w4a16", "--method", "awq", "--max-shard-bytes", "100000"]),
        ("qwen3", ["--scheme", "w2a16", "--method", "gptq", "--group-size", "16", "--no-act-order"]),
        ("mixtral", ["--scheme", "w8a16", "--method", "rtn"]),
    ],
)
def test_the_engine_serves_what_the_weights_stand_for(checkpoints, tmp_path, capsys, family, flags):
    model_dir, out = checkpoints.get(family), tmp_path / "out"
    assert main(["quantize", str(model_dir), "--out", str(out), *flags, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "perplexity on 31 held-out tokens" in shown
    assert f"wavetrain serve {out}" in shown
    dense = write_dequantized(out, model_dir, tmp_path / "dense")
    assert logprobs(out) == pytest.approx(logprobs(dense), abs=2e-4)


def test_ctrl_c_keeps_finished_layers_and_the_same_command_goes_on(checkpoints, tmp_path):
    model_dir, out = checkpoints.get("llama", num_hidden_layers=6), tmp_path / "out"
    command = [sys.executable, "-m", "wavetrain_cli.main", "quantize", str(model_dir), "--out", str(out)]
    command += ["--scheme", "w4a16", "--method", "gptq", "--report-windows", "0"]
    command += ["--calibration-windows", "400", "--window-tokens", "64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    work = WorkFolder.beside(out).path
    deadline = time.monotonic() + TIMEOUT_S
    while not (work / "layer-00001.json").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "the same command goes on after the last finished layer" in errors
    assert not out.exists()
    finished = (work / "layer-00000.safetensors").read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy(), timeout=TIMEOUT_S, check=True)
    assert "size:" in done.stdout
    assert not work.exists()
    kept = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight_packed"]
    assert kept.numpy().tobytes() in finished


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--scheme", "w8a8", "--method", "awq"], 2, "w8a8 goes with rtn, gptq, smoothquant; awq goes with w4a16"),
        (["--scheme", "w4a16", "--method", "smoothquant"], 2, "smoothquant goes with w8a8"),
        (["--scheme", "fp8", "--method", "gptq"], 2, "fp8 goes with rtn"),
        (["--scheme", "w5a16", "--method", "rtn"], 2, "invalid choice: 'w5a16'"),
        (["--scheme", "w4a16", "--method", "rtn", "--group-size", "128"], 1, "does not divide the 64 inputs"),
        (["--scheme", "w4a16", "--method", "gptq", "--calibration", "missing"], 1, "No such file"),
        (["--scheme", "w4a16"], 2, "--method"),
        (["--scheme", "w4a16", "--method", "rtn", "--gruop-size", "32"], 2, "did you mean --group-size"),
    ],
)
def test_what_does_not_fit_is_one_line(checkpoints, tmp_path, capsys, flags, code, message):
    model_dir = checkpoints.get("llama")
    capsys.readouterr()  # what making it has shown
    assert main(["quantize", str(model_dir), "--out", str(tmp_path / "out"), *flags]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_models_that_are_not_there_or_not_whole_are_one_line(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "out"), "--scheme", "fp8", "--method", "rtn"]
    (tmp_path / "empty").mkdir()
    for model in ("missing", "empty"):
        assert main(["quantize", str(tmp_path / model), *flags]) == 1
        assert capsys.readouterr().err.count("\n") == 1
