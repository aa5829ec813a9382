# SPDX-License-Identifier: Apache-2.0
"""One budget for everybody, a strict order, and steps planned ahead of results."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fakes.core import CoreHarness, make_facts
from fakes.executor import sequential_output
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.kv_cache_manager import KVCacheManager
from wavetrain_engine.core.request_state import RequestState
from wavetrain_engine.core.scheduler import ScheduledStep, Scheduler
from wavetrain_engine.errors import ConfigError, ErrorCode
from wavetrain_engine.plan import StepPlan, StepResult
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams


def _spans(plan: StepPlan) -> dict[str, tuple[int, int]]:
    return {row.request_id: (row.num_computed_tokens, row.num_scheduled_tokens) for row in plan.scheduled}


def _alone(harness: CoreHarness, prompt: list[int], **params: Any) -> list[int]:
    return sequential_output(
        prompt,
        SamplingParams(**{"temperature": 0.0, **params}),
        vocab_size=harness.facts.vocab_size,
        max_model_len=harness.max_model_len,
        eos=harness.executor.eos,
    )[0]


def test_one_budget_mixes_a_decoding_request_and_chunks_of_a_prompt() -> None:
    harness = CoreHarness(max_num_batched_tokens=8)
    harness.add("short", [1, 2], max_tokens=4)
    harness.step()
    harness.add("long", list(range(16)), max_tokens=1)
    harness.run()
    assert [_spans(plan) for plan in harness.executor.plans] == [
        {"short": (0, 2)},
        {"short": (2, 1), "long": (0, 7)},
        {"short": (3, 1), "long": (7, 7)},
        {"short": (4, 1), "long": (14, 2)},
    ]
    assert [[row.is_sampling for row in plan.scheduled] for plan in harness.executor.plans[1:]] == [
        [True, False],
        [True, False],
        [True, True],
    ]


def test_a_chunk_of_a_better_request_leaves_a_token_for_each_behind_it() -> None:
    harness = CoreHarness(max_num_batched_tokens=8)
    for name in ("a", "b"):
        harness.add(name, [1, 2], priority=1, max_tokens=9)
    harness.step()
    harness.add("urgent", list(range(20)), priority=0, max_tokens=2)
    harness.step()
    harness.step()
    assert _spans(harness.executor.plans[-1]) == {"urgent": (6, 6), "a": (3, 1), "b": (3, 1)}


def test_a_long_prompt_takes_no_more_than_its_threshold() -> None:
    harness = CoreHarness(long_prefill_token_threshold=5)
    harness.add("long", list(range(12)), max_tokens=1)
    harness.add("other", list(range(20, 24)), max_tokens=1)
    harness.run()
    assert [_spans(plan) for plan in harness.executor.plans] == [
        {"long": (0, 5), "other": (0, 4)},
        {"long": (5, 5)},
        {"long": (10, 2)},
    ]


def test_seats_are_given_by_priority_then_arrival() -> None:
    harness = CoreHarness(max_num_seqs=1)
    for name, priority in (("first", 1), ("second", 1), ("urgent", 0), ("idle", 2)):
        harness.add(name, [1], priority=priority, max_tokens=1)
    harness.run()
    assert [plan.admitted[0].request_id for plan in harness.executor.plans] == ["urgent", "first", "second", "idle"]


@pytest.mark.parametrize("is_async", [False, True])
def test_the_worst_priority_then_the_latest_is_preempted_and_resumes_unharmed(is_async: bool) -> None:
    harness = CoreHarness(num_blocks=6, async_scheduling=is_async, enable_prefix_caching=False)
    prompts = {"low": [1, 2, 3], "early": [4, 5, 6], "late": [7, 8, 9]}
    for name, prompt in prompts.items():
        harness.add(name, prompt, priority=int(name == "low"), max_tokens=12)
    harness.run()
    preempted = {name: harness.last(name).stats.num_preemptions for name in prompts}  # pyright: ignore
    assert preempted["early"] == 0
    assert preempted["low"] >= preempted["late"] > 0
    for name, prompt in prompts.items():
        assert harness.tokens(name) == _alone(harness, prompt, max_tokens=12)
    assert harness.core.stats().num_preemptions == sum(preempted.values())


def test_who_is_preempted_does_not_come_back_in_the_same_step() -> None:
    harness = CoreHarness(num_blocks=4, max_num_seqs=3, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3, 4], max_tokens=12)
    harness.add("b", [1, 2, 3, 4], max_tokens=12)
    while harness.core.stats().num_preemptions == 0:
        harness.step()
    plan = harness.executor.plans[-1]
    assert (plan.removed, plan.admitted) == (["b"], [])


def test_a_prompt_waits_until_all_of_it_fits_beside_unfinished_prompts() -> None:
    harness = CoreHarness(num_blocks=8, long_prefill_token_threshold=4, enable_prefix_caching=False)
    harness.add("first", list(range(20)), max_tokens=2)  # 5 blocks, one per step
    harness.add("second", list(range(30, 46)), max_tokens=1)  # 4 blocks: only 3 are not owed to the first
    harness.run()
    assert harness.core.stats().num_preemptions == 0
    admissions = {item.request_id: plan.step_id for plan in harness.executor.plans for item in plan.admitted}
    assert admissions == {"first": 0, "second": 6}


class TestStepsInFlight:
    """Depth 1: a step is planned before the result of the one before it is seen."""

    def test_a_step_is_always_queued_behind_the_one_collected(self) -> None:
        harness = CoreHarness(async_scheduling=True)
        harness.add("r", [1, 2], max_tokens=5)
        assert len(harness.step()) == 1
        assert harness.executor.num_queued == 1
        harness.run()
        assert harness.tokens("r") == _alone(harness, [1, 2], max_tokens=5)

    def test_a_last_token_that_is_known_to_be_last_costs_no_surplus_step(self) -> None:
        harness = CoreHarness(async_scheduling=True)
        harness.add("r", [1, 2], max_tokens=5)
        harness.run()
        assert len(harness.executor.plans) == 5

    def test_a_stop_is_found_one_step_late_and_the_surplus_token_dropped(self) -> None:
        output = _alone(CoreHarness(), [1, 2], max_tokens=8)
        harness = CoreHarness(async_scheduling=True, eos=(output[3],))
        harness.add("r", [1, 2], max_tokens=8)
        harness.run()
        assert harness.tokens("r") == output[: output.index(output[3]) + 1]
        assert harness.reason("r") is FinishReason.STOP
        assert len(harness.executor.plans) == len(harness.tokens("r")) + 1

    def test_a_finished_id_can_be_used_again_while_its_surplus_step_runs(self) -> None:
        harness = CoreHarness(async_scheduling=True)
        harness.add("r", [1, 2], max_tokens=8)
        harness.step()
        harness.core.cancel("r")
        harness.step()
        told = len(harness.updates.pop("r"))
        harness.add("r", [3, 4], max_tokens=8)
        harness.run()
        assert told == 2
        assert harness.tokens("r") == _alone(harness, [3, 4], max_tokens=8)

    def test_a_preempted_request_is_not_admitted_before_its_token_is_seen(self) -> None:
        scheduler = _scheduler(num_blocks=2)
        best, other = _state("best", 0), _state("other", 1)
        scheduler.add(best)
        scheduler.add(other)
        first = _plan(scheduler)
        second = _plan(scheduler)  # the best needs the other's block
        assert second.plan.removed == ["other"]
        updates: list[RequestUpdate] = []
        scheduler.update(first, StepResult([[5], [6]]), 1, updates)
        updates += [scheduler.end(best, FinishReason.CANCELLED, None)]
        third = _plan(scheduler)
        assert [item.token_ids for item in third.plan.admitted] == [[1, 2, 3, 4, 6]]
        assert third.plan.removed == ["best"]

    def test_nor_at_any_greater_depth(self) -> None:
        scheduler = _scheduler(num_blocks=2)
        best, other = _state("best", 0), _state("other", 1)
        scheduler.add(best)
        scheduler.add(other)
        first = _plan(scheduler)
        _plan(scheduler)
        scheduler.end(best, FinishReason.CANCELLED, None)
        assert scheduler.schedule(1) is None  # all blocks are free, but a token of the other is not seen
        scheduler.update(first, StepResult([[5], [6]]), 1, [])
        assert _spans(_plan(scheduler).plan) == {"other": (0, 5)}


def _scheduler(num_blocks: int) -> Scheduler:
    config = EngineConfig.from_flags({"num_blocks": num_blocks, "block_size": 4})
    facts = make_facts(config, max_model_len=num_blocks * 4, vocab_size=10, eos=[])
    return Scheduler(config.scheduler, facts, KVCacheManager(num_blocks=num_blocks, block_size=4, is_caching=False))


def _state(request_id: str, index: int) -> RequestState:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    return RequestState(
        EngineRequest(request_id=request_id, prompt_token_ids=[1, 2, 3, 4], sampling_params=params),
        sampling_params=params,
        token_ids=[1, 2, 3, 4],
        index=index,
        max_num_tokens=8,
        eos_token_ids=frozenset(),
        arrival_time_ns=1,
    )


def _plan(scheduler: Scheduler) -> ScheduledStep:
    step = scheduler.schedule(1)
    assert step is not None
    return step


@pytest.mark.parametrize("is_async", [False, True])
def test_nan_logits_end_that_request_only(is_async: bool) -> None:
    harness = CoreHarness(nan_token_id=95, async_scheduling=is_async)
    good = list(range(9))
    harness.add("good", good, max_tokens=6)
    harness.add("bad", [*range(20, 28), 95], max_tokens=6)
    harness.run()
    assert harness.tokens("good") == _alone(harness, good, max_tokens=6)
    last = harness.last("bad")
    assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, ErrorCode.INTERNAL)
    assert last.error == "the logits are not finite"
    assert harness.tokens("bad") == []


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_output", [0, 6])
def test_blocks_of_a_request_with_nan_logits_are_not_found_again(num_output: int, is_async: bool) -> None:
    prompt = list(range(20, 28))
    nan_token_id = [prompt[-1], *_alone(CoreHarness(), prompt, max_tokens=6)][num_output]
    harness = CoreHarness(nan_token_id=nan_token_id, async_scheduling=is_async)
    harness.add("bad", prompt, max_tokens=20)
    harness.run()
    assert len(harness.tokens("bad")) == num_output
    assert harness.reason("bad") is FinishReason.ERROR
    assert harness.core.stats().num_blocks_cached == 0


def test_logprobs_come_with_their_tokens_and_those_of_the_prompt_once() -> None:
    harness = CoreHarness(max_num_batched_tokens=4)
    prompt = list(range(10))
    harness.add("r", prompt, max_tokens=3, logprobs=0, prompt_logprobs=0)
    harness.run()
    first, *others = harness.updates["r"]
    assert [entry.token_ids for entry in first.prompt_logprobs or []] == [[token_id] for token_id in prompt[1:]]
    assert all(update.prompt_logprobs is None for update in others)
    entries = [entry.token_ids[0] for update in harness.updates["r"] for entry in update.logprobs or []]
    assert entries == harness.tokens("r")


def test_an_end_token_before_min_tokens_does_not_end_a_request() -> None:
    scheduler, request = _scheduler(num_blocks=4), _state("r", 0)
    request.end_token_ids = request.eos_token_ids = frozenset([9])
    request.min_num_tokens = 4 + 2
    scheduler.add(request)
    updates: list[RequestUpdate] = []
    for _ in range(2):  # a sampler that masks nothing
        scheduler.update(_plan(scheduler), StepResult([[9]]), 1, updates)
    assert [update.finish_reason for update in updates] == [None, FinishReason.STOP]


def test_a_result_that_does_not_fit_its_plan_is_refused() -> None:
    scheduler = _scheduler(num_blocks=2)
    scheduler.add(_state("r", 0))
    with pytest.raises(RuntimeError, match="2 results for 1 rows"):
        scheduler.update(_plan(scheduler), StepResult([[1], [2]]), 1, [])
    with pytest.raises(RuntimeError, match="2 tokens were sampled"):
        scheduler.update(_plan(scheduler), StepResult([[1, 2]]), 1, [])


def test_a_cache_too_small_for_one_request_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="lower --max-model-len"):
        CoreHarness(num_blocks=4, block_size=4, max_model_len=17)


def test_kv_waste_on_a_trace_of_mixed_lengths_is_at_most_4_percent() -> None:
    draw = random.Random(0)
    harness = CoreHarness(
        num_blocks=4000, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=4096
    )
    for index in range(200):
        num_prompt = min(2000, max(5, int(draw.lognormvariate(5.5, 1.2))))
        num_output = min(512, max(8, int(draw.lognormvariate(4.5, 1.0))))
        prompt = [draw.randrange(90) for _ in range(num_prompt)]
        harness.add(f"r{index}", prompt, max_tokens=num_output)
    harness.executor.is_checking_reads = False
    computed: dict[str, int] = {}
    shares: list[float] = []
    while harness.core.has_work:
        harness.step()
        plan = harness.executor.plans[-1]
        for row in plan.scheduled:
            computed[row.request_id] = row.num_computed_tokens + row.num_scheduled_tokens
        for request_id in [name for name in computed if harness.reason(name) is not None]:
            del computed[request_id]
        num_slots = harness.core.stats().num_blocks_used * 16
        if num_slots:
            shares.append(1 - sum(computed.values()) / num_slots)
    assert sum(shares) / len(shares) <= 0.04
