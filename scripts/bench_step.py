#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a step costs the host: 256 decoding requests, an executor that computes nothing.

    .venv/bin/python scripts/bench_step.py
    .venv/bin/python scripts/bench_step.py --requests 32 --prompt-len 2000 --steps 1000

One JSON line for each part, times in µs for a whole step:

- `step`: EngineCore.step without the executor: planning, accounting, making the updates; `schedule` and `update` are
  its halves, before and after the executor.
- `encode`: the updates as one message of the core's socket.
- `inputs`: the input batch of the step's plan as host arrays.
- `worker`: ModelRunner.execute on a model that computes nothing and a vocabulary of 8: input batch, tensors, metadata,
  the sampler's fixed part, appending the tokens and making the result.
- `launch`, `collect`: the same on the runner of a GPU, with a CPU for its device and a graph that does nothing: until
  the step is on its way, and from the tokens' arrival to the result.

Prompts differ in length, so blocks fill in different steps, as they do in service. Only ratios on a quiet machine mean
much: `low` and `high` are the 10th and 90th percentile of the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from bench_target import percentile, where_measured
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.ipc.frames import Updates, encode
from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.plan import StepPlan, StepResult
from wavetrain_engine.request import EngineRequest, RequestUpdate
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker.cuda_graphs import GraphKey
from wavetrain_engine.worker.device_batch import DeviceBatch, StepShape
from wavetrain_engine.worker.device_runner import DeviceRunner
from wavetrain_engine.worker.input_batch import InputBatch
from wavetrain_engine.worker.model_runner import ModelRunner
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens

VOCAB_SIZE = 8
TOKEN_ID = 3
BLOCK_SIZE = 16
CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parent.parent / "model_repository" / "engine" / "1" / "demo"

Times = defaultdict[str, list[int]]
"""Nanoseconds of every step, by part."""


class NullExecutor:
    """Gives every row that samples the same token, from lists made beforehand; notes when it was called."""

    def __init__(self) -> None:
        self.plan: StepPlan | None = None
        self.submitted_ns = 0
        self.collected_ns = 0
        self._tokens: list[list[int]] = []

    def submit(self, plan: StepPlan) -> NullExecutor:
        """Takes a step; it is its own pending result."""
        self.submitted_ns = time.perf_counter_ns()
        self.plan = plan
        self._tokens = [[TOKEN_ID] if row.is_sampling else [] for row in plan.scheduled]
        return self

    def result(self) -> StepResult:
        """Gives the result of the step taken last."""
        result = StepResult(sampled_token_ids=self._tokens)
        self.collected_ns = time.perf_counter_ns()
        return result

    def shutdown(self) -> None:
        """Has nothing to free."""


class NullModel(Model):
    """Hidden states and logits that are always the same."""

    def __init__(self, config: ModelConfig, num_tokens: int) -> None:
        super().__init__(config, torch.float32, CPU, config.max_model_len)
        self._hidden = torch.zeros(num_tokens, 1)
        self._logits = torch.zeros(num_tokens, VOCAB_SIZE)
        self._logits[:, TOKEN_ID] = 1.0

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[KVCache],
        metadata: AttentionMetadata,
        wanted: WantedTokens | None = None,
    ) -> Tensor:
        """See Model."""
        del positions, kv_caches, metadata
        return self._hidden[: len(input_ids if wanted is None else wanted.indices)]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See Model."""
        return self._logits[: len(hidden)]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The sizes of one run, and what is made from them."""

    num_requests: int
    prompt_len: int
    num_steps: int

    @property
    def max_model_len(self) -> int:
        """Room for every step, warm-up included, in every request."""
        return self.prompt_len + 2 * BLOCK_SIZE + 2 * self.num_steps

    def make_core(self, executor: NullExecutor) -> EngineCore:
        """A core whose cache holds everything."""
        num_blocks = self.num_requests * (-(-self.max_model_len // BLOCK_SIZE) + 1)
        num_tokens = max(2048, self.num_requests)
        flags = {"max_num_seqs": self.num_requests, "num_blocks": num_blocks, "block_size": BLOCK_SIZE}
        config = EngineConfig.from_flags({**flags, "max_num_batched_tokens": num_tokens})
        facts = EngineFacts(
            architecture="",
            dtype="float32",
            device="cpu",
            cpu_threads=1,
            kernels="",
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            kv_cache_dtype="float32",
            kv_cache_bytes=0,
            weight_bytes=0,
            max_num_seqs=self.num_requests,
            max_num_batched_tokens=num_tokens,
            generation=GenerationConfig(eos_token_ids=[]),
            load_s=0.0,
            version="",
        )
        return EngineCore(config, facts, executor)

    def make_batch(self) -> InputBatch:
        """Rows for all requests."""
        return InputBatch(
            max_num_seqs=self.num_requests, max_model_len=self.max_model_len + BLOCK_SIZE, block_size=BLOCK_SIZE
        )

    def make_device_runner(self) -> DeviceRunner:
        """One that keeps its state on a device, and replays a graph for all requests."""
        shape = StepShape(self.num_requests, self.num_requests)
        batch = DeviceBatch(
            max_num_seqs=self.num_requests,
            max_model_len=self.max_model_len + BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            static_shape=shape,
            device=CPU,
        )
        model = NullModel(ModelConfig.load(DEMO), max(2048, self.num_requests))
        runner = DeviceRunner(
            model=model, kv_caches=[], batch=batch, state=SamplingState(VOCAB_SIZE, CPU), eos_token_ids=[]
        )
        runner.capture([GraphKey(self.num_requests, 1)], lambda _run: lambda: None)
        return runner

    def make_runner(self) -> ModelRunner:
        """A runner of the null model."""
        model = NullModel(ModelConfig.load(DEMO), max(2048, self.num_requests))
        return ModelRunner(
            model=model,
            kv_caches=[],
            batch=self.make_batch(),
            state=SamplingState(VOCAB_SIZE, CPU),
            eos_token_ids=[],
        )

    def add_requests(self, core: EngineCore) -> None:
        """Prompts of lengths that spread the block boundaries over the steps, without a common prefix."""
        for index in range(self.num_requests):
            prompt = [(index >> shift) % VOCAB_SIZE for shift in (0, 3, 6, 9)]
            prompt += [index % VOCAB_SIZE] * (max(self.prompt_len - len(prompt), 0) + index % BLOCK_SIZE)
            params = SamplingParams(temperature=0, max_tokens=self.max_model_len, ignore_eos=True)
            core.add_request(
                EngineRequest(request_id=f"request-{index}", prompt_token_ids=prompt, sampling_params=params)
            )


class HostFollower:
    """The worker's side on a CPU: an input batch alone and one in a runner; both are told of every step."""

    def __init__(self, bench: Bench) -> None:
        self._batch = bench.make_batch()
        self._runner = bench.make_runner()

    def follow(self, plan: StepPlan, times: Times) -> StepResult:
        """Applies a plan and notes what it took."""
        for request in plan.admitted:
            self._batch.add(request)
        start = time.perf_counter_ns()
        inputs = self._batch.inputs(plan.scheduled)
        times["inputs"].append(time.perf_counter_ns() - start)
        rows = inputs.rows[[row.is_sampling for row in plan.scheduled]]
        self._batch.append_tokens(rows, rows * 0 + TOKEN_ID)
        start = time.perf_counter_ns()
        result = self._runner.execute(plan)
        times["worker"].append(time.perf_counter_ns() - start)
        return result


class DeviceFollower:
    """The worker's side on a GPU."""

    def __init__(self, bench: Bench) -> None:
        self._runner = bench.make_device_runner()

    def follow(self, plan: StepPlan, times: Times) -> StepResult:
        """Applies a plan and notes what it took."""
        start = time.perf_counter_ns()
        pending = self._runner.launch(plan)
        times["launch"].append(time.perf_counter_ns() - start)
        start = time.perf_counter_ns()
        result = pending.result()
        times["collect"].append(time.perf_counter_ns() - start)
        return result


def measure(bench: Bench, follower: HostFollower | DeviceFollower) -> Times:
    """Runs the steps; the times are those in which every request decodes."""
    executor = NullExecutor()
    core = bench.make_core(executor)
    bench.add_requests(core)
    times: Times = defaultdict(list)
    warm_up = 0
    while len(times["step"]) < bench.num_steps:
        start = time.perf_counter_ns()
        updates = core.step()
        end = time.perf_counter_ns()
        if executor.plan is None:
            raise SystemExit("the core planned no step")
        result = follower.follow(executor.plan, times)
        if any(sampled not in ([TOKEN_ID], []) for sampled in result.sampled_token_ids):
            raise SystemExit("the null model's token did not come out of the worker")
        warm_up += len(updates) == bench.num_requests
        if warm_up <= BLOCK_SIZE:
            times.clear()
            continue
        note(times, executor, updates, start, end)
    return times


def note(times: Times, executor: NullExecutor, updates: list[RequestUpdate], start: int, end: int) -> None:
    """Adds the parts of one core step that began at `start`, and the time its message takes."""
    times["schedule"].append(executor.submitted_ns - start)
    times["update"].append(end - executor.collected_ns)
    times["step"].append(times["schedule"][-1] + times["update"][-1])
    start = time.perf_counter_ns()
    encode(Updates(updates=updates))
    times["encode"].append(time.perf_counter_ns() - start)


def main() -> None:
    """Prints one JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="requests that decode (%(default)s)")
    parser.add_argument("--prompt-len", type=int, default=128, help="shortest prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="steps that count (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.requests, args.prompt_len, args.steps)
    times = measure(bench, HostFollower(bench))
    beside_a_gpu = measure(bench, DeviceFollower(bench))
    times |= {part: beside_a_gpu[part] for part in ("launch", "collect")}
    where = where_measured()
    for part in ("step", "schedule", "update", "encode", "inputs", "worker", "launch", "collect"):
        micros = [value / 1000 for value in times[part]]
        figures = {
            "median_us": round(percentile(micros, 50), 1),
            "mean_us": round(sum(micros) / len(micros), 1),
            "low_us": round(percentile(micros, 10), 1),
            "high_us": round(percentile(micros, 90), 1),
        }
        case = {"benchmark": "host_cost_of_a_step", "part": part, "requests": args.requests, "steps": args.steps}
        print(json.dumps({**case, "prompt_len": args.prompt_len, **figures, **where}), flush=True)


if __name__ == "__main__":
    main()
