# SPDX-License-Identifier: Apache-2.0
"""Start-up on a GPU, as far as a CPU can play one: what is measured and rehearsed, and every refusal's words."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes.device_core import FakeRecorder, device_on_cpu, graphs_of
from fakes.real_core import RealCore
from fakes.tiny_checkpoints import VOCAB_SIZE, make_tiny_checkpoint
from wavetrain_engine.config import CacheSection, EngineConfig
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import ConfigError, EngineDead
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest, StepPlan
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker import device_start, load, memory
from wavetrain_engine.worker.device_runner import DeviceRunner, PendingStep
from wavetrain_engine.worker.executor import DeviceExecutor
from wavetrain_engine.worker.memory import GIB, measure_working_bytes, num_kv_blocks

CUDA = torch.device("cuda")
Refuse = Callable[..., Any]


def out_of_memory(*_arguments: Any, **_options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), with_tokenizer=False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    return device_on_cpu(monkeypatch, with_graphs=True)


class TestRehearsal:
    @pytest.mark.parametrize(
        "flags",
        [
            {"max_num_seqs": 1, "max_num_batched_tokens": 1},
            {"max_num_seqs": 8, "max_num_batched_tokens": 3},
            {"max_num_seqs": 3, "max_num_batched_tokens": 100, "max_model_len": 8},
            {"max_num_seqs": 2, "max_num_batched_tokens": 9, "max_model_len": 2},
        ],
    )
    def test_under_any_limits(
        self, checkpoint: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int]
    ) -> None:
        plans: list[StepPlan] = []
        launch = DeviceRunner.launch
        monkeypatch.setattr(DeviceRunner, "launch", lambda self, plan: plans.append(plan) or launch(self, plan))
        core = RealCore(checkpoint, **flags)
        steps = [plan for plan in plans if plan.scheduled]
        assert max(plan.num_tokens for plan in steps) <= flags["max_num_batched_tokens"]
        assert max(len(plan.scheduled) for plan in steps) == min(flags["max_num_seqs"], flags["max_num_batched_tokens"])
        longest = core.facts.max_model_len - 1
        assert all(len(request.token_ids) <= longest for plan in steps for request in plan.admitted)
        # The first is the largest there can be, and asks for everything.
        most = min(flags["max_num_batched_tokens"], flags["max_num_seqs"] * longest)
        assert steps[0].num_tokens == most
        assert steps[0].admitted[0].sampling_params.logprobs is not None
        # Each is followed by one in which all its requests leave.
        live: set[str] = set()
        for plan in plans:
            live = (live - set(plan.removed)) | {request.request_id for request in plan.admitted}
        assert not live
        core.close()

    def test_nothing_of_it_is_left(self, checkpoint: Path, recorder: FakeRecorder) -> None:
        core = RealCore(checkpoint)
        graphs = graphs_of(core)
        assert graphs is not None
        assert graphs.sizes() == [1, 2, 4, 8]
        assert recorder.num_replays == 0
        assert len(core.run_one([5, 6, 7], temperature=1.0, seed=3, repetition_penalty=1.2)) == 12
        assert recorder.num_replays == 11
        core.close()


class TestNoGraphs:
    def recorder(self, kernels: str, **flags: Any) -> Any:
        config = EngineConfig.from_flags(flags)
        return device_start._recorder(config, SimpleNamespace(kernels=kernels))  # type: ignore[arg-type]

    def test_by_flag(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="wavetrain_engine"):
            assert self.recorder("gpu", enforce_eager=True) is None
        assert "no CUDA graphs: --enforce-eager is set" in caplog.text

    def test_with_kernels_that_read_on_the_host(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.recorder("reference") is None
        assert "so decoding is slow: the reference kernels read their inputs on the host" in caplog.text

    def test_where_a_step_cannot_be_captured(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(_run: Callable[[], None]) -> Any:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
            finally:
                raise RuntimeError("the capture was cut short")

        device_on_cpu(monkeypatch, with_graphs=False)
        monkeypatch.setattr(device_start, "_recorder", lambda _config, _facts: refuse)
        core = RealCore(checkpoint)
        assert graphs_of(core) is None
        assert "a step cannot be captured (operation not permitted when stream is capturing)" in caplog.text
        assert "cut short" not in caplog.messages[-1]
        assert len(core.run_one([5, 6, 7])) == 12
        core.close()


class TestOutOfMemory:
    """Every stage says what had no room and which flag to lower."""

    def test_tables(self, checkpoint: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device_start, "DeviceBatch", out_of_memory)
        with pytest.raises(ConfigError, match="ids of 8 requests of 512 tokens; lower --max-num-seqs or --max-model-l"):
            RealCore(checkpoint)

    def test_the_largest_step(self, checkpoint: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("wavetrain_engine.models.llama.Llama.forward", out_of_memory)
        with pytest.raises(ConfigError, match="128 tokens beside the weights; lower --max-num-batched-tokens or --max"):
            RealCore(checkpoint)

    def test_the_cache(self, checkpoint: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
        allocate = device_start.allocate_kv_caches

        def only_one(spec: Any, num_blocks: int, *rest: Any) -> Any:
            return allocate(spec, num_blocks, *rest) if num_blocks == 1 else out_of_memory()

        monkeypatch.setattr(device_start, "allocate_kv_caches", only_one)
        with pytest.raises(ConfigError, match="too small for 96 KV-cache blocks; lower --gpu-memory-utilization"):
            RealCore(checkpoint)

    def test_graphs(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        device_on_cpu(monkeypatch, with_graphs=False)
        monkeypatch.setattr(device_start, "_recorder", lambda _config, _facts: out_of_memory)
        with pytest.raises(ConfigError, match="too small for CUDA graphs; lower --gpu-memory-utilization, or set --en"):
            RealCore(checkpoint)

    def test_in_the_midst_of_a_capture(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def cut_short(_run: Callable[[], None]) -> Any:
            try:
                out_of_memory()
            finally:
                raise RuntimeError("the capture was invalidated")

        device_on_cpu(monkeypatch, with_graphs=False)
        monkeypatch.setattr(device_start, "_recorder", lambda _config, _facts: cut_short)
        with pytest.raises(ConfigError, match="too small for CUDA graphs"):
            RealCore(checkpoint)

    def test_a_step_while_serving(
        self, checkpoint: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        core = RealCore(checkpoint)
        core.add("a", [5, 6, 7])
        monkeypatch.setattr("wavetrain_engine.models.llama.Llama.forward", out_of_memory)
        with pytest.raises(EngineDead, match="no memory left for a step; serve with a lower --gpu-memory-utilization"):
            core.step()
        core.close()


class TestBlocks:
    @pytest.fixture(autouse=True)
    def sixty_of_eighty_gib_are_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (60 * GIB, 80 * GIB))

    def test_what_steps_work_in_is_left_free(self) -> None:
        cache = CacheSection(gpu_memory_utilization=0.5)
        assert num_kv_blocks(cache, 2**20, 10**9, CUDA, working_bytes=5 * GIB) == 15 * 1024

    def test_flags_in_blocks_and_bytes_have_to_fit_beside_it(self) -> None:
        with pytest.raises(ConfigError, match=r"--num-blocks 57344 asks for 56.00 GiB of KV cache, but 55.00 GiB are"):
            num_kv_blocks(CacheSection(num_blocks=56 * 1024), 2**20, 1, CUDA, working_bytes=5 * GIB)

    def test_working_memory_is_the_peak_beyond_what_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        numbers = {"memory_allocated": 3, "max_memory_allocated": 10}
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda _device, name=name: calls.append(name) or numbers.get(name))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
        assert measure_working_bytes(lambda: calls.append("run"), CUDA) == 7
        assert calls.index("reset_peak_memory_stats") < calls.index("run") < calls.index("memory_allocated")
        assert calls[-1] == "empty_cache"
        assert memory.measure_working_bytes(lambda: None, torch.device("cpu")) == 0


class TestDtype:
    @pytest.fixture
    def model_config(self, tmp_path: Path) -> ModelConfig:
        return ModelConfig.load(make_tiny_checkpoint(tmp_path, with_tokenizer=False, dtype=torch.bfloat16))

    @pytest.fixture(autouse=True)
    def turing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")

    def test_an_older_gpu_gets_float16(self, model_config: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
        assert load._dtype(EngineConfig(), model_config, CUDA) is torch.float16
        assert (
            "Tesla T4 has compute capability 7.5, and bfloat16 needs 8.0: the model is served in float16" in caplog.text
        )

    def test_what_was_asked_for_is_not_replaced(self, model_config: ModelConfig) -> None:
        with pytest.raises(
            ConfigError, match=r"--dtype bfloat16: Tesla T4 has .*; use --dtype float16, or leave it to"
        ):
            load._dtype(EngineConfig.from_flags({"dtype": "bfloat16"}), model_config, CUDA)
        assert load._dtype(EngineConfig.from_flags({"dtype": "float32"}), model_config, CUDA) is torch.float32

    def test_newer_ones_and_cpus_keep_it(self, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load._dtype(EngineConfig(), model_config, torch.device("cpu")) is torch.bfloat16
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
        assert load._dtype(EngineConfig(), model_config, CUDA) is torch.bfloat16


class TestPlanningAhead:
    @pytest.mark.parametrize(
        ("flag", "device", "expected"),
        [(None, "cpu", False), (None, "cuda", True), (True, "cpu", True), (False, "cuda", False)],
    )
    def test_by_default_beside_a_gpu_only(self, flag: bool | None, device: str, expected: bool) -> None:
        config = EngineConfig.from_flags({"async_scheduling": flag})
        assert config.scheduler.plans_ahead(device) is expected


class TestRandomWeights:
    def load(self, directory: Path, **flags: Any) -> RealCore:
        return RealCore(directory, load_format="dummy", **flags)

    @pytest.mark.parametrize("family", ["llama-bias", "qwen3", "gemma2", "mixtral"])
    def test_a_config_is_enough(self, tmp_path: Path, family: str) -> None:
        full = make_tiny_checkpoint(tmp_path / "full", family, with_tokenizer=False)
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare/config.json").write_bytes((full / "config.json").read_bytes())
        first, second = self.load(tmp_path / "bare"), self.load(tmp_path / "bare")
        tokens = first.run_one([5, 6, 7, 8])
        assert tokens == second.run_one([5, 6, 7, 8])
        assert first.facts.weight_bytes == RealCore(full).facts.weight_bytes
        assert len(set(first.run_one([9, 8], temperature=1.0, seed=1, max_tokens=40))) > 20  # spread, not degenerate

    def test_the_log_says_so(self, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.load(checkpoint)
        assert "the weights are random: --load-format dummy is for measuring" in caplog.text

    def test_progress(self, checkpoint: Path) -> None:
        calls: list[tuple[str, int, int]] = []
        flags = {"model": str(checkpoint), "device": "cpu", "num_blocks": 64, "load_format": "dummy"}
        executor, facts = load.load_executor(
            EngineConfig.from_flags(flags), environment=Environment.read(), progress=lambda *call: calls.append(call)
        )
        executor.shutdown()
        assert calls[-1] == ("weights", facts.weight_bytes, facts.weight_bytes)
        assert json.loads((checkpoint / "config.json").read_text())["vocab_size"] == VOCAB_SIZE


class TestLostDevice:
    class LostEvent:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    def test_a_result_that_never_comes(self) -> None:
        pending = PendingStep(lambda: pytest.fail("nothing was read back"), self.LostEvent(), 41)
        message = (
            r"the GPU failed in step 41 or before it \(CUDA error: an illegal memory access was encountered\); the"
        )
        with pytest.raises(EngineDead, match=message):
            pending.result()

    @pytest.mark.parametrize(
        "error", [torch.AcceleratorError("device lost", 719), RuntimeError("Triton Error [CUDA]: misaligned address")]
    )
    def test_a_launch_that_is_refused(
        self, checkpoint: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
    ) -> None:
        def fail(*_arguments: Any) -> Any:
            raise error

        core = RealCore(checkpoint)
        core.add("a", [5, 6, 7])
        monkeypatch.setattr("wavetrain_engine.models.llama.Llama.forward", fail)
        with pytest.raises(EngineDead, match=r"the GPU failed in step 0 or before it .* has to start anew"):
            core.step()
        core.close()

    def test_our_own_mistakes_stay_what_they_are(self, checkpoint: Path, recorder: FakeRecorder) -> None:
        core = RealCore(checkpoint)
        params = SamplingParams(temperature=0.0)
        plan = StepPlan(0, [], [AdmittedRequest("a", [1], 1, params, [0], 0)], [ScheduledRequest("b", 0, 1, [], True)])
        pending = core.executor.submit(plan)
        with pytest.raises(KeyError):
            pending.result()
        core.close()

    def test_after_shutdown_nothing_runs(self, checkpoint: Path, recorder: FakeRecorder) -> None:
        executor = RealCore(checkpoint).executor
        assert isinstance(executor, DeviceExecutor)
        assert executor.submit(StepPlan(0, [], [], [])).result().sampled_token_ids == []
        executor.shutdown()
        executor.shutdown()
        assert executor.runner is None
        with pytest.raises(RuntimeError, match="the executor is shut down"):
            executor.submit(StepPlan(0, [], [], []))
