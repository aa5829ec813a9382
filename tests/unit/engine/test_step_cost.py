# SPDX-License-Identifier: Apache-2.0
"""What a step costs the host, without a clock: Python calls and memory for each request that just decodes."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakes.core import make_facts
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.models.model import Model
from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest, StepPlan, StepResult
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling.state import SamplingState
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker.device_batch import DeviceBatch, StepShape
from wavetrain_engine.worker.device_runner import DeviceRunner
from wavetrain_engine.worker.input_batch import InputBatch
from wavetrain_engine.worker.model_runner import ModelRunner


class NullExecutor:
    """Samples the same token for every row and makes nothing else: what is counted is the core's."""

    def __init__(self, num_rows: int) -> None:
        self._sampled = [[5] for _ in range(num_rows)]

    def submit(self, plan: StepPlan) -> NullExecutor:
        del plan
        return self

    def result(self) -> StepResult:
        return StepResult(self._sampled)

    def shutdown(self) -> None:
        """Nothing to free."""


def decoding_core(num_requests: int) -> EngineCore:
    """A core whose requests have their prompts behind them, and their next steps without a new block before them."""
    flags = {"num_blocks": 4096, "block_size": 16, "max_num_seqs": num_requests, "max_num_batched_tokens": 8192}
    config = EngineConfig.from_flags(flags)
    facts = make_facts(config, max_model_len=1024, vocab_size=100, eos=[2])
    core = EngineCore(config, facts, NullExecutor(num_requests))
    for index in range(num_requests):
        params = SamplingParams(temperature=0.0, max_tokens=500)
        core.add_request(EngineRequest(request_id=str(index), prompt_token_ids=[1] * 17, sampling_params=params))
    for _ in range(4):
        core.step()
    return core


def num_calls(function: Callable[[], Any]) -> int:
    """Python functions that were entered."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory held at a time beyond what was held before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_decoding_request_costs_two_calls_a_step() -> None:
    few, many = (num_calls(decoding_core(num_requests).step) for num_requests in (32, 160))
    assert many - few <= 2 * 128


def test_a_decoding_request_costs_a_row_and_an_update_a_step() -> None:
    few, many = (peak_bytes(decoding_core(num_requests).step) for num_requests in (32, 160))
    assert many - few <= 400 * 128


class NullModel:
    """Hidden states and logits that are there already."""

    def __init__(self) -> None:
        self._logits = {num_rows: torch.zeros(num_rows, 8) for num_rows in (1, 64)}

    def forward(self, input_ids: torch.Tensor, *_rest: Any) -> torch.Tensor:
        return input_ids

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[hidden.shape[0]]


class OpCounter(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def decoding_runner(num_rows: int) -> Callable[[], StepResult]:
    """Runs the next step of a runner whose requests decode; no blocks fill meanwhile."""
    cpu = torch.device("cpu")
    runner = ModelRunner(
        model=cast("Model", NullModel()),
        kv_caches=[],
        batch=InputBatch(max_num_seqs=num_rows, max_model_len=64, block_size=16),
        state=SamplingState(8, cpu),
        eos_token_ids=[],
    )
    return following_steps(runner.execute, num_rows)


def decoding_device_runner(num_rows: int) -> Callable[[], StepResult]:
    """The same on the runner of a GPU, with a CPU for its device."""
    cpu = torch.device("cpu")
    runner = DeviceRunner(
        model=cast("Model", NullModel()),
        kv_caches=[],
        batch=DeviceBatch(
            max_num_seqs=num_rows, max_model_len=64, block_size=16, static_shape=StepShape(64, 64), device=cpu
        ),
        state=SamplingState(8, cpu),
        eos_token_ids=[],
    )
    return following_steps(lambda plan: runner.launch(plan).result(), num_rows)


def following_steps(execute: Callable[[StepPlan], StepResult], num_rows: int) -> Callable[[], StepResult]:
    """Runs the first steps and returns what runs the next."""
    params = SamplingParams(temperature=0.0)
    ids = [str(index) for index in range(num_rows)]
    admitted = [AdmittedRequest(name, [1, 2], 2, params, [index], 1) for index, name in enumerate(ids)]
    plans = [StepPlan(0, [], admitted, [ScheduledRequest(name, 1, 1, (), True) for name in ids])]
    plans += [StepPlan(n, [], [], [ScheduledRequest(name, 1 + n, 1, (), True) for name in ids]) for n in range(1, 8)]
    execute(plans.pop(0))
    execute(plans.pop(0))
    return lambda: execute(plans.pop(0))


@pytest.mark.parametrize("num_rows", [1, 64])
def test_a_step_that_decodes_on_asks_torch_for_little(num_rows: int) -> None:
    step = decoding_runner(num_rows)
    with OpCounter() as counter:
        result = step()
    assert len(result.sampled_token_ids) == num_rows
    names = [name for name in counter.names if "resolve" not in name]  # these only look at flags
    assert len(names) <= 5, names  # two results, the maximum that fills them, and reading them back


@pytest.mark.parametrize("make_runner", [decoding_runner, decoding_device_runner])
def test_a_row_that_decodes_on_costs_the_worker_no_call(make_runner: Callable[[int], Callable[[], StepResult]]) -> None:
    few, many = (num_calls(make_runner(num_rows)) for num_rows in (1, 64))
    assert many - few < 16
