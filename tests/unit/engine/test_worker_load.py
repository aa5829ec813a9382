# SPDX-License-Identifier: Apache-2.0
"""Loading: what is found out, and an own message for everything that cannot be."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fakes.tiny_checkpoints import EOS_TOKEN_ID, MAX_POSITION_EMBEDDINGS, VOCAB_SIZE, make_tiny_checkpoint
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import CheckpointError, ConfigError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.plan import StepPlan
from wavetrain_engine.weights import loader
from wavetrain_engine.worker.load import load_executor
from wavetrain_kernels.reference.kernels import REFERENCE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), with_tokenizer=False)


def load(directory: Path | str, *, kernels: str = "auto", **flags: Any) -> EngineFacts:
    config = EngineConfig.from_flags({"model": str(directory), "device": "cpu", "max_num_seqs": 4} | flags)
    executor, facts = load_executor(config, environment=Environment.read({"WAVETRAIN_KERNELS": kernels}))
    executor.shutdown()
    return facts


def test_facts(checkpoint: Path) -> None:
    facts = load(checkpoint, num_blocks=40, block_size=8, max_model_len=64)
    assert (facts.architecture, facts.dtype, facts.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (facts.vocab_size, facts.max_model_len, facts.num_blocks, facts.block_size) == (VOCAB_SIZE, 64, 40, 8)
    assert facts.generation.eos_token_ids == [EOS_TOKEN_ID]
    assert facts.max_concurrency == 40 * 8 / 64
    # Keys and values, 2 layers, 2 heads of 16, in float32.
    assert facts.kv_cache_bytes == 40 * 8 * 2 * 2 * 2 * 16 * 4
    weights = load_file(checkpoint / "model.safetensors")
    assert facts.weight_bytes == sum(weight.nbytes for weight in weights.values())
    assert facts.load_s > 0


def test_the_flag_decides_how_many_threads_compute(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert load(checkpoint, cpu_threads=3).cpu_threads == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert load(checkpoint).cpu_threads <= before


def test_without_flags_every_seat_has_room_for_a_full_length(checkpoint: Path) -> None:
    facts = load(checkpoint)
    assert (facts.max_model_len, facts.max_concurrency) == (MAX_POSITION_EMBEDDINGS, 4)


def test_progress_and_log(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[str, int, int]] = []
    config = EngineConfig.from_flags({"model": str(checkpoint), "device": "cpu", "num_blocks": 64})
    with caplog.at_level(logging.INFO, logger="wavetrain_engine"):
        executor, facts = load_executor(
            config, environment=Environment.read(), progress=lambda *call: calls.append(call)
        )
    executor.shutdown()
    assert {phase for phase, _, _ in calls} == {"weights"}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == calls[-1][2] == facts.weight_bytes
    assert "LlamaForCausalLM, float32 on cpu, " in caplog.text
    assert "KV cache: float32, 64 blocks of 16 tokens" in caplog.text
    assert "2.0 requests of 512 tokens at once" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_may_be_another(checkpoint: Path, dtype: str) -> None:
    assert load(checkpoint, dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    ("activation_dtype", "is_faster", "dtype", "expected"),
    [
        ("auto", True, "bfloat16", True),
        ("auto", False, "bfloat16", False),
        ("auto", True, "float32", False),
        ("model", True, "bfloat16", False),
        ("int8", False, "float32", True),
    ],
)
def test_which_inputs_are_rounded_to_int8(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    activation_dtype: str,
    is_faster: bool,
    dtype: str,
    expected: bool,
) -> None:
    seen: list[bool] = []

    def load_weights(*args: Any, has_int8_inputs: bool, **options: Any) -> int:
        seen.append(has_int8_inputs)
        return loader.load_weights(*args, **options)

    kernels = dataclasses.replace(REFERENCE, is_faster_in_int8=is_faster)
    monkeypatch.setattr("wavetrain_engine.worker.load.load_weights", load_weights)
    monkeypatch.setattr("wavetrain_engine.worker.load.choose_kernels", lambda *_: kernels)
    load(checkpoint, activation_dtype=activation_dtype, dtype=dtype)
    assert seen == [expected]


def test_a_gpu_rounds_no_inputs_that_the_checkpoint_does_not_round(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wavetrain_engine.worker.load._device", lambda _config: torch.device("cuda"))
    monkeypatch.setattr("wavetrain_engine.worker.load.choose_kernels", lambda *_: REFERENCE)
    with pytest.raises(ConfigError, match="--activation-dtype int8: inputs are rounded so on CPUs only"):
        load(checkpoint, activation_dtype="int8", dtype="float32")


def test_too_many_seats_for_the_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_sizes: int) -> None:
        raise MemoryError

    monkeypatch.setattr("wavetrain_engine.worker.load.InputBatch", refuse)
    with pytest.raises(ConfigError, match="4 requests of 512 tokens; lower --max-num-seqs or --max-model-len"):
        load(checkpoint)


def test_a_length_that_was_not_asked_for_gives_way(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="wavetrain_engine"):
        facts = load(checkpoint, num_blocks=5)
    assert facts.max_model_len == 80
    assert "max_model_len lowered from 512 to 80 tokens, what the KV cache holds" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"max_model_len": 64, "num_blocks": 3},
            "--max-model-len 64 needs 4 KV-cache blocks, but there are 3; lower it to 48 or raise --num-blocks",
        ),
        (
            {"max_model_len": 64, "kv_cache_memory": 3 * 8192},
            "--max-model-len 64 needs 4 KV-cache blocks, .* lower it to 48 or raise --kv-cache-memory",
        ),
        ({"kv_cache_memory": 100}, "--kv-cache-memory 100 holds no block; one takes 8192 bytes"),
        ({"num_blocks": 2**31 - 1}, r"--num-blocks 2147483647 asks for \d+\.\d+ GiB of KV cache, but"),
        ({"num_blocks": 1, "block_size": 1}, "the KV cache holds 1 token, too few for a prompt and an output"),
        ({"max_model_len": MAX_POSITION_EMBEDDINGS + 1}, "max_model_len 513 is longer than the 512 tokens .* lower"),
    ],
)
def test_flags_that_do_not_fit(checkpoint: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(checkpoint, **flags)


def test_a_gpu_that_is_not_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: no usable NVIDIA GPU was found; `wavetrain doctor` says"):
        load(checkpoint, device="cuda")
    assert load(checkpoint, device="auto").device == "cpu"


def test_kernels_that_the_device_cannot_run(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="WAVETRAIN_KERNELS=gpu: no gpu kernels for device 'cpu'; available there: a"):
        load(checkpoint, kernels="gpu")
    assert load(checkpoint, kernels="reference").kernels == "reference"


def test_no_model_and_no_directory(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no model is set; give a checkpoint directory"):
        load("")
    missing, other = tmp_path / "nowhere", checkpoint / "config.json"
    refusals = {missing: "there is no checkpoint directory 'nowhere'", other: "'config.json' is not a directory; give"}
    for path, message in refusals.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path)
        assert str(path.parent) not in str(caught.value)


def test_a_bad_generation_config_is_found_before_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "generation_config.json").write_text(json.dumps({"top_p": 7.0}), encoding="utf-8")
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p must be more than 0"):
        load(broken)


@pytest.mark.parametrize("is_async", [False, True])
def test_after_shutdown_nothing_runs(checkpoint: Path, is_async: bool) -> None:
    config = EngineConfig.from_flags(
        {"model": str(checkpoint), "device": "cpu", "num_blocks": 32, "async_scheduling": is_async}
    )
    executor, _ = load_executor(config, environment=Environment.read())
    plan = StepPlan(step_id=0, removed=[], admitted=[], scheduled=[])
    assert executor.submit(plan).result().sampled_token_ids == []
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="the executor is shut down"):
        executor.submit(plan)
