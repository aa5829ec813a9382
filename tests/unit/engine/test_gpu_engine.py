# SPDX-License-Identifier: Apache-2.0
"""The engine on a real GPU: tokens as on the CPU, with graphs and without; nothing compiled, nothing waited for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.device_core import graphs_of
from fakes.real_core import RealCore
from fakes.tiny_checkpoints import VOCAB_SIZE, make_tiny_checkpoint
from wavetrain_engine.plan import PendingResult, StepPlan
from wavetrain_engine.worker.device_runner import DeviceRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

RNG = random.Random(7)
PROMPTS = [[RNG.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (40, 1, 17, 33, 8, 64, 5)]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "logprobs": 2},
    {"temperature": 0.8, "seed": 6, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.0, "bad_words_token_ids": [[5], [6, 7]], "min_tokens": 5, "logit_bias": {9: 2.0}},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("gpu"), with_tokenizer=False, head_dim=64)


@pytest.fixture
def cores() -> Iterator[list[RealCore]]:
    cores: list[RealCore] = []
    yield cores
    for core in cores:
        core.close()


def gpu_core(directory: Path, **flags: Any) -> RealCore:
    usual = {"device": "cuda", "dtype": "bfloat16", "block_size": 16, "num_blocks": 200, "max_num_batched_tokens": 64}
    return RealCore(directory, **usual | flags)


def serve(core: RealCore) -> list[list[int]]:
    """Each prompt once, arriving one after the other."""
    for index, prompt in enumerate(PROMPTS):
        core.add(f"r{index}", prompt, max_tokens=24, **SAMPLING[index % len(SAMPLING)])
        core.step()
    core.run()
    return [core.tokens(f"r{index}") for index in range(len(PROMPTS))]


def test_greedy_tokens_are_those_of_the_cpu(directory: Path, cores: list[RealCore]) -> None:
    """In float32, where the best and the second best logit lie further apart than roundings reach."""
    cores += [RealCore(directory, dtype="float32"), gpu_core(directory, dtype="float32")]
    for prompt in PROMPTS:
        assert cores[1].run_one(prompt) == cores[0].run_one(prompt)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_graphs_compute_what_eager_steps_do(directory: Path, cores: list[RealCore], kv_cache_dtype: str) -> None:
    flags = {"max_num_seqs": 1, "kv_cache_dtype": kv_cache_dtype}
    cores += [gpu_core(directory, **flags), gpu_core(directory, **flags, enforce_eager=True)]
    assert graphs_of(cores[0]) is not None, "the log says why nothing was captured"
    assert graphs_of(cores[1]) is None
    assert serve(cores[0]) == serve(cores[1])


def test_a_step_in_flight_changes_nothing(directory: Path, cores: list[RealCore]) -> None:
    cores += [gpu_core(directory, max_num_seqs=1), gpu_core(directory, max_num_seqs=1, async_scheduling=False)]
    assert serve(cores[0]) == serve(cores[1])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_nothing_is_compiled_while_serving(directory: Path, cores: list[RealCore], kv_cache_dtype: str) -> None:
    from wavetrain_kernels.gpu.launch import compile_count, compiled_since

    cores.append(gpu_core(directory, num_blocks=20, max_model_len=128, kv_cache_dtype=kv_cache_dtype))
    before = compile_count()
    serve(cores[0])
    assert compiled_since(before) == []


def test_launching_waits_for_nothing(directory: Path, cores: list[RealCore], monkeypatch: pytest.MonkeyPatch) -> None:
    launch = DeviceRunner.launch

    def launch_strictly(self: DeviceRunner, plan: StepPlan) -> PendingResult:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    cores.append(gpu_core(directory))
    monkeypatch.setattr(DeviceRunner, "launch", launch_strictly)
    assert all(serve(cores[0]))


def test_the_cache_takes_what_is_left(directory: Path, cores: list[RealCore]) -> None:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    share = min(0.5, free_bytes / total_bytes / 2)
    core = gpu_core(directory, num_blocks=None, max_num_seqs=256, gpu_memory_utilization=share)
    cores.append(core)
    assert core.facts.num_blocks >= 256 * (512 // 16)
    assert torch.cuda.memory_reserved() < share * total_bytes
