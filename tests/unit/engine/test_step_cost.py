# SPDX-License-Identifier: Apache-2.0
"""What a step costs the host, without a clock: Python calls and memory for each request that just decodes."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

from fakes.core import make_facts
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.plan import StepPlan, StepResult
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams


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
