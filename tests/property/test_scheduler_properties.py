# SPDX-License-Identifier: Apache-2.0
"""Whatever arrives, in whatever order, into however small a cache: the core's promises hold.

No block leaks, nothing starves, every accepted request ends exactly once, and what a request generates is
what it would have generated alone: preempted, chunked, cached and overlapped output equals the plain one.
The fake executor checks every plan on the way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.core import CoreHarness
from fakes.executor import sequential_output
from wavetrain_engine.errors import ErrorCode, QueueFull
from wavetrain_engine.request import FinishReason
from wavetrain_engine.sampling_params import SamplingParams

VOCAB_SIZE = 41
NAN_TOKEN_ID = 7
EOS = (3,)

# Draws an integer between two bounds, both included: from hypothesis, or from a seeded generator.
Draw = Callable[[int, int], int]


@dataclass
class Arrival:
    """One request, and what happens to it. Steps and seconds are the same here: the clock ticks once a step."""

    prompt: list[int]
    at_step: int
    params: dict[str, Any]
    priority: int
    cache_salt: str
    deadline_step: int | None
    cancel_step: int | None


@dataclass
class Scenario:
    """A configuration and what arrives."""

    flags: dict[str, Any]
    max_model_len: int
    arrivals: list[Arrival] = field(default_factory=list[Arrival])


def _draw_scenario(draw: Draw) -> Scenario:
    block_size, num_blocks = draw(1, 5), draw(2, 14)
    flags: dict[str, Any] = {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": draw(1, 8),
        "max_num_batched_tokens": draw(1, 24),
        "long_prefill_token_threshold": draw(0, 6),
        "enable_prefix_caching": draw(0, 3) > 0,
        "async_scheduling": draw(0, 1) == 1,
        "max_queue_size": 100 if draw(0, 4) else draw(0, 3),
    }
    capacity = block_size * num_blocks
    max_model_len = max(2, capacity - draw(0, capacity // 2))
    arrivals = [_draw_arrival(draw, max_model_len) for _ in range(draw(1, 12))]
    arrivals.sort(key=lambda arrival: arrival.at_step)
    return Scenario(flags, max_model_len, arrivals)


def _draw_arrival(draw: Draw, max_model_len: int) -> Arrival:
    num_shared, num_own = draw(0, max_model_len - 1) // draw(1, 3), draw(0, 3)
    family = draw(0, 1)
    prompt = [(position * 5 + family) % 3 + 8 for position in range(num_shared)]
    prompt = [*prompt, *(draw(4, VOCAB_SIZE - 1) for _ in range(num_own))][: max_model_len - 1] or [5]
    at_step = draw(0, 20)
    max_tokens = draw(1, 20)
    params: dict[str, Any] = {
        "temperature": float(draw(0, 1)),
        "seed": draw(0, 3),
        "max_tokens": None if draw(0, 9) == 9 else max_tokens,
        "min_tokens": 0 if draw(0, 2) else draw(0, max_tokens),
        "ignore_eos": draw(0, 3) > 0,
        "stop_token_ids": [draw(4, VOCAB_SIZE - 1)] if draw(0, 3) == 3 else [],
        "logprobs": draw(0, 2) if draw(0, 4) == 4 else None,
        "prompt_logprobs": 0 if draw(0, 5) == 5 else None,
    }
    return Arrival(
        prompt=prompt,
        at_step=at_step,
        params=params,
        priority=draw(0, 2) if draw(0, 1) else 0,
        cache_salt="" if draw(0, 2) else "tenant",
        deadline_step=at_step + draw(0, 25) if draw(0, 6) == 6 else None,
        cancel_step=at_step + draw(0, 25) if draw(0, 4) == 4 else None,
    )


def _run(scenario: Scenario) -> CoreHarness:
    """Plays a scenario to its end and checks every promise."""
    harness = CoreHarness(
        max_model_len=scenario.max_model_len,
        eos=EOS,
        nan_token_id=NAN_TOKEN_ID,
        vocab_size=VOCAB_SIZE,
        **scenario.flags,
    )
    core, start_s = harness.core, harness.clock.now_s
    accepted: dict[str, Arrival] = {}
    cancelled: set[str] = set()
    num_left, step = len(scenario.arrivals), 0
    most_steps = 100 + 3 * sum(
        len(item.prompt) + (item.params["max_tokens"] or scenario.max_model_len) for item in scenario.arrivals
    )
    while num_left or core.has_work:
        assert step < most_steps, "somebody starves"
        for index, arrival in enumerate(scenario.arrivals):
            request_id = f"r{index}"
            if arrival.at_step == step:
                num_left -= 1
                if _add(harness, request_id, arrival, start_s):
                    accepted[request_id] = arrival
            if arrival.cancel_step == step and request_id in accepted:
                was_finished = harness.reason(request_id) is not None
                core.cancel(request_id)
                core.check()
                if not was_finished:
                    cancelled.add(request_id)
        harness.step()
        core.check()
        assert harness.executor.num_queued <= int(scenario.flags["async_scheduling"])
        step += 1
        harness.clock.now_s = start_s + step
    for request_id, arrival in accepted.items():
        _check_outcome(harness, scenario, request_id, arrival, cancelled)
    _check_order(harness, accepted)
    _check_balance(harness, len(accepted))
    return harness


def _add(harness: CoreHarness, request_id: str, arrival: Arrival, start_s: float) -> bool:
    deadline_s = None if arrival.deadline_step is None else start_s + arrival.deadline_step
    try:
        harness.add(
            request_id,
            arrival.prompt,
            priority=arrival.priority,
            cache_salt=arrival.cache_salt,
            deadline_s=deadline_s,
            **arrival.params,
        )
    except QueueFull:
        return False
    return True


def _check_outcome(
    harness: CoreHarness, scenario: Scenario, request_id: str, arrival: Arrival, cancelled: set[str]
) -> None:
    params = SamplingParams(**arrival.params)
    alone, reason = sequential_output(
        arrival.prompt,
        params,
        vocab_size=VOCAB_SIZE,
        max_model_len=scenario.max_model_len,
        eos=EOS,
        nan_token_id=NAN_TOKEN_ID,
    )
    last, output = harness.last(request_id), harness.tokens(request_id)
    assert last.stats is not None
    assert last.stats.num_output_tokens == len(output)
    assert last.stats.num_prompt_tokens == len(arrival.prompt)
    if last.finish_reason is FinishReason.CANCELLED:
        assert output == alone[: len(output)]
        if last.error_code is None:
            assert request_id in cancelled
        else:
            assert (last.error_code, arrival.deadline_step is None) == (ErrorCode.DEADLINE, False)
    else:
        assert (output, last.finish_reason) == (alone, reason)
        if reason is FinishReason.ERROR:
            assert last.error_code is ErrorCode.INTERNAL
    told = harness.updates[request_id]
    logprobs = [entry for update in told for entry in update.logprobs or []]
    assert [entry.token_ids[0] for entry in logprobs] == ([] if params.logprobs is None else output)
    prompts = [update.prompt_logprobs for update in told if update.prompt_logprobs is not None]
    if params.prompt_logprobs is not None and output:
        assert [[entry.token_ids[0] for entry in entries] for entries in prompts] == [arrival.prompt[1:]]
    else:
        assert not prompts


def _check_order(harness: CoreHarness, accepted: dict[str, Arrival]) -> None:
    """Within a priority, requests are admitted for the first time in the order in which they came."""
    admissions = [item.request_id for plan in harness.executor.plans for item in plan.admitted]
    firsts = list(dict.fromkeys(admissions))
    for priority in range(3):
        order = [request_id for request_id in firsts if accepted[request_id].priority == priority]
        arrived = [request_id for request_id in accepted if request_id in set(order)]
        assert order == arrived


def _check_balance(harness: CoreHarness, num_accepted: int) -> None:
    stats = harness.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
    assert stats.num_requests_accepted == num_accepted == sum(stats.num_requests_finished.values())
    assert stats.num_output_tokens == sum(len(harness.tokens(request_id)) for request_id in harness.updates)
    assert stats.num_steps == len(harness.executor.plans)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Scenarios that hypothesis can shrink."""
    return _draw_scenario(lambda low, high: draw(st.integers(low, high)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(scenarios())
def test_promises_hold_for_any_scenario(scenario: Scenario) -> None:
    _run(scenario)


@pytest.mark.parametrize("part", range(4))
def test_promises_hold_in_a_soak(part: int) -> None:
    num_preemptions = num_hits = 0
    for seed in range(part * 1000, (part + 1) * 1000):
        stats = _run(_draw_scenario(random.Random(seed).randint)).core.stats()
        num_preemptions += stats.num_preemptions
        num_hits += stats.num_prefix_cache_hit_tokens
    assert num_preemptions > 300, "the soak does not reach what it is for"
    assert num_hits > 1000


def test_equal_priorities_never_starve_under_endless_load() -> None:
    harness = CoreHarness(num_blocks=8, block_size=4, max_num_seqs=3, max_num_batched_tokens=8)
    ended_at: dict[str, int] = {}
    for step in range(600):
        if step % 4 == 0:  # more than it can serve: the queue only grows
            harness.add(f"r{step}", [step % VOCAB_SIZE, 1, 2], max_tokens=20)
        for update in harness.step():
            if update.finish_reason is not None:
                ended_at[update.request_id] = step
    order = list(ended_at)
    assert len(order) > 25
    assert order == [f"r{step}" for step in range(0, 4 * len(order), 4)], "first come, first served"


def test_a_worse_priority_is_served_once_the_better_ones_pause() -> None:
    harness = CoreHarness(num_blocks=8, block_size=4, max_num_seqs=2)
    harness.add("low", [1, 2, 3], priority=5, max_tokens=8)
    for step in range(100):
        harness.add(f"high{step}", [step % 50, 1, 2], max_tokens=3)
        harness.step()
    harness.run()
    assert harness.reason("low") is FinishReason.LENGTH
