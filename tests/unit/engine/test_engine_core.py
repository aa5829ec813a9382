# SPDX-License-Identifier: Apache-2.0
"""What the core accepts, and that everything it accepts ends once, for the right reason."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.core import VOCAB_SIZE, CoreHarness
from fakes.executor import sequential_output
from wavetrain_engine.errors import (
    EngineDead,
    ErrorCode,
    InvalidSamplingParams,
    PromptTooLong,
    QueueFull,
    RequestCancelled,
    RequestError,
)
from wavetrain_engine.request import EngineRequest, FinishReason
from wavetrain_engine.sampling_params import SamplingParams


def _alone(prompt: list[int], **params: Any) -> list[int]:
    values = SamplingParams(**{"temperature": 0.0, **params})
    return sequential_output(prompt, values, vocab_size=VOCAB_SIZE, max_model_len=256)[0]


class TestAdmission:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "the prompt is empty"),
            ([1, -2], "prompt token id -2 is not in the vocabulary, whose 97 tokens are numbered 0 to 96"),
            ([1, 97, 5], "prompt token id 97 is not in the vocabulary"),
            ([2**70], "beyond the vocabulary of 97"),
            ([1, "2"], "integers only"),
            ([1, None], "integers only"),
            ([1.5], "integers only"),
        ],
    )
    def test_refuses_a_prompt_that_is_not_one(self, prompt: list[Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            CoreHarness().add("r", prompt)

    def test_refuses_a_prompt_that_leaves_no_room(self) -> None:
        harness = CoreHarness(max_model_len=16)
        with pytest.raises(PromptTooLong, match=r"16 tokens, but max_model_len is 16 .* at most 15; shorten it"):
            harness.add("r", [1] * 16)
        harness.add("r", [1] * 15, max_tokens=5)
        harness.run()
        assert (len(harness.tokens("r")), harness.reason("r")) == (1, FinishReason.LENGTH)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"stop_token_ids": [5, 97]}, "stop_token_ids 97 is not in the vocabulary"),
            ({"logit_bias": {97: 1.0}}, "logit_bias's token id 97"),
            ({"bad_words_token_ids": [[1], [2, 99]]}, "bad_words_token_ids 99"),
            ({"bad_words_token_ids": [[]]}, "empty sequence"),
            ({"logprobs": 98}, "logprobs is 98, but the vocabulary has only 97"),
            ({"prompt_logprobs": 98}, "prompt_logprobs is 98"),
            ({"n": 2}, "n must be 1"),
        ],
    )
    def test_refuses_parameters_this_model_cannot_honour(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidSamplingParams, match=message):
            CoreHarness().add("r", [1], **params)

    def test_refuses_an_id_in_use_and_leaves_its_owner_alone(self) -> None:
        harness = CoreHarness()
        harness.add("r", [1, 2], max_tokens=3)
        with pytest.raises(RequestError, match="'r' is in use"):
            harness.add("r", [3])
        harness.run()
        assert harness.tokens("r") == _alone([1, 2], max_tokens=3)
        harness.add("r2", [3])

    def test_refuses_when_as_many_wait_as_may(self) -> None:
        harness = CoreHarness(max_num_seqs=2, max_queue_size=3)
        for index in range(5):
            harness.add(f"r{index}", [1])
        with pytest.raises(QueueFull, match="3 requests wait, as many as --max-queue-size allows; try again later"):
            harness.add("r5", [1])
        harness.run()
        harness.add("r5", [1])

    def test_without_a_queue_it_takes_what_can_run_at_once(self) -> None:
        harness = CoreHarness(max_num_seqs=2, max_queue_size=0)
        harness.add("a", [1])
        harness.add("b", [1])
        with pytest.raises(QueueFull, match="0 requests wait"):
            harness.add("c", [1])

    def test_free_seats_without_blocks_are_no_room(self) -> None:
        harness = CoreHarness(num_blocks=4, max_num_seqs=8, max_queue_size=2)
        for index in range(3):
            harness.add(f"r{index}", [index] * 12, max_tokens=2)
        harness.step()
        with pytest.raises(QueueFull):
            harness.add("r3", [1])

    def test_a_refused_request_leaves_no_trace(self) -> None:
        harness = CoreHarness()
        with pytest.raises(RequestError):
            harness.add("r", [])
        assert not harness.core.has_work
        assert harness.core.stats().num_requests_accepted == 0

    def test_draws_a_seed_once_where_sampling_needs_one(self) -> None:
        harness = CoreHarness()
        harness.add("random", [1], temperature=1.0)
        harness.add("also", [1], temperature=1.0)
        harness.add("greedy", [1])
        harness.add("seeded", [1], temperature=1.0, seed=7)
        harness.step()
        seeds = {item.request_id: item.sampling_params.seed for item in harness.executor.plans[0].admitted}
        assert seeds["random"] is not None
        assert seeds["random"] != seeds["also"]
        assert (seeds["greedy"], seeds["seeded"]) == (None, 7)

    def test_the_caller_keeps_its_prompt(self) -> None:
        harness, prompt = CoreHarness(), [1, 2, 3]
        harness.add("r", prompt, max_tokens=4)
        harness.run()
        assert prompt == [1, 2, 3]


class TestStopConditions:
    def test_eos_ends_a_request_and_is_its_last_token(self) -> None:
        output = _alone([1, 2], max_tokens=8)
        harness = CoreHarness(eos=(output[2],))
        harness.add("r", [1, 2], max_tokens=8)
        harness.add("deaf", [1, 2], max_tokens=8, ignore_eos=True)
        harness.run()
        assert harness.tokens("r") == output[:3]
        assert (harness.reason("r"), harness.last("r").stop_token_id) == (FinishReason.STOP, None)
        assert (harness.tokens("deaf"), harness.reason("deaf")) == (output, FinishReason.LENGTH)

    def test_a_stop_token_is_named(self) -> None:
        output = _alone([1, 2], max_tokens=8)
        harness = CoreHarness()
        harness.add("r", [1, 2], max_tokens=8, stop_token_ids=[output[2]])
        harness.run()
        assert harness.tokens("r") == output[:3]
        assert (harness.reason("r"), harness.last("r").stop_token_id) == (FinishReason.STOP, output[2])

    def test_eos_is_eos_even_when_listed_as_a_stop_token(self) -> None:
        output = _alone([1, 2], max_tokens=8)
        harness = CoreHarness(eos=(output[2],))
        harness.add("r", [1, 2], max_tokens=8, stop_token_ids=[output[2]])
        harness.run()
        assert (harness.reason("r"), harness.last("r").stop_token_id) == (FinishReason.STOP, None)

    def test_no_end_token_counts_before_min_tokens(self) -> None:
        output = _alone([1, 2], max_tokens=8)
        harness = CoreHarness(eos=(output[1],))
        harness.add("r", [1, 2], max_tokens=8, min_tokens=6)
        harness.run()
        assert len(harness.tokens("r")) >= 6

    def test_max_tokens_is_clipped_to_the_room_and_its_absence_means_all_of_it(self) -> None:
        harness = CoreHarness(max_model_len=20)
        harness.add("huge", [1] * 5, max_tokens=2**31 - 1)
        harness.add("open", [2] * 5, max_tokens=None)
        harness.run()
        assert [len(harness.tokens(name)) for name in ("huge", "open")] == [15, 15]
        assert harness.reason("huge") is harness.reason("open") is FinishReason.LENGTH


@pytest.mark.parametrize("is_async", [False, True])
class TestEnds:
    def test_a_waiting_request_is_cancelled(self, is_async: bool) -> None:
        harness = CoreHarness(max_num_seqs=1, async_scheduling=is_async)
        harness.add("runs", [1], max_tokens=3)
        harness.add("waits", [1], max_tokens=3)
        harness.step()
        harness.core.cancel("waits")
        harness.run()
        assert [update.finish_reason for update in harness.updates["waits"]] == [FinishReason.CANCELLED]
        assert harness.last("waits").error_code is None

    def test_a_running_request_is_cancelled_and_its_blocks_are_free_at_once(self, is_async: bool) -> None:
        harness = CoreHarness(async_scheduling=is_async)
        harness.add("r", [1] * 9, max_tokens=30)
        harness.step()
        assert harness.core.stats().num_blocks_used == 3
        harness.core.cancel("r", RequestCancelled("the client went away"))
        assert harness.core.stats().num_blocks_used == 0
        harness.run()
        last = harness.last("r")
        assert (last.finish_reason, last.error_code) == (FinishReason.CANCELLED, ErrorCode.CANCELLED)
        assert last.error == "the client went away"
        assert last.stats is not None
        assert last.stats.num_output_tokens == 1

    def test_cancelling_the_unknown_and_the_finished_does_nothing(self, is_async: bool) -> None:
        harness = CoreHarness(async_scheduling=is_async)
        harness.add("r", [1], max_tokens=1)
        harness.run()
        harness.core.cancel("r")
        harness.core.cancel("never")
        assert not harness.core.has_work
        assert harness.core.step() == []

    def test_cancelling_twice_tells_once(self, is_async: bool) -> None:
        harness = CoreHarness(async_scheduling=is_async)
        harness.add("r", [1], max_tokens=9)
        harness.step()
        harness.core.cancel("r")
        harness.core.cancel("r")
        harness.run()
        assert len(harness.updates["r"]) == 2

    def test_deadlines_end_waiting_and_running_requests(self, is_async: bool) -> None:
        harness = CoreHarness(max_num_seqs=1, async_scheduling=is_async)
        now_s = harness.clock.now_s
        harness.add("runs", [1], max_tokens=200, deadline_s=now_s + 5)
        harness.add("waits", [1], max_tokens=200, deadline_s=now_s + 3)
        harness.add("next", [1, 2], max_tokens=2, deadline_s=now_s + 100)
        for _ in range(10):
            harness.clock.now_s += 1
            harness.step()
        for name, num_tokens in (("runs", 4), ("waits", 0)):
            last = harness.last(name)
            assert (last.finish_reason, last.error_code) == (FinishReason.CANCELLED, ErrorCode.DEADLINE)
            assert last.error == f"the request's deadline passed after {num_tokens} output tokens"
            assert len(harness.tokens(name)) == num_tokens
        harness.run()
        assert harness.reason("next") is FinishReason.LENGTH

    def test_a_deadline_in_the_past_still_ends_with_one_update(self, is_async: bool) -> None:
        harness = CoreHarness(async_scheduling=is_async)
        harness.add("r", [1], deadline_s=harness.clock.now_s - 1)
        harness.run()
        assert [update.error_code for update in harness.updates["r"]] == [ErrorCode.DEADLINE]
        assert harness.executor.plans == []

    def test_end_all_ends_everything_with_the_error_and_refuses_what_comes(self, is_async: bool) -> None:
        harness = CoreHarness(max_num_seqs=1, async_scheduling=is_async)
        for name in ("runs", "waits", "cancelled"):
            harness.add(name, [1], max_tokens=9)
        harness.step()
        harness.core.cancel("cancelled")
        updates = harness.core.end_all(EngineDead("gone"))
        told = {update.request_id: (update.finish_reason, update.error_code) for update in updates}
        assert told == {
            "cancelled": (FinishReason.CANCELLED, None),
            "runs": (FinishReason.ERROR, ErrorCode.DEAD),
            "waits": (FinishReason.ERROR, ErrorCode.DEAD),
        }
        assert not harness.core.has_work
        assert harness.core.end_all(EngineDead("gone")) == []
        with pytest.raises(EngineDead, match="gone"):
            harness.add("late", [1])

    def test_a_preempted_request_can_be_cancelled(self, is_async: bool) -> None:
        harness = CoreHarness(num_blocks=4, enable_prefix_caching=False, async_scheduling=is_async)
        harness.add("a", [1, 2, 3, 4], max_tokens=12)
        harness.add("b", [1, 2, 3, 4], max_tokens=12)
        while harness.core.stats().num_preemptions == 0:
            harness.step()
        harness.core.cancel("b")
        harness.run()
        assert harness.tokens("a") == _alone([1, 2, 3, 4], max_tokens=12)
        assert harness.reason("b") is FinishReason.CANCELLED


def test_an_idle_step_returns_at_once_with_nothing() -> None:
    harness = CoreHarness()
    assert not harness.core.has_work
    assert harness.core.step() == []


def test_stats_of_a_request_are_what_it_cost() -> None:
    harness = CoreHarness(max_num_batched_tokens=8)
    prompt = list(range(10))
    harness.add("warm", prompt, max_tokens=1)
    harness.run()
    harness.clock.now_s = 2000.0
    harness.add("r", prompt, max_tokens=3, arrival_time_ns=5)
    for now_s in (2001.0, 2002.0, 2003.0):
        harness.clock.now_s = now_s
        harness.step()
    stats = harness.last("r").stats
    assert stats is not None
    assert (stats.arrival_time_ns, stats.first_scheduled_time_ns) == (5, 2001 * 10**9)
    assert (stats.first_token_time_ns, stats.last_token_time_ns) == (2001 * 10**9, 2003 * 10**9)
    assert (stats.num_prompt_tokens, stats.num_output_tokens, stats.num_cached_tokens) == (10, 3, 8)
    assert (stats.num_new_blocks, stats.num_reused_blocks, stats.num_preemptions) == (1, 2, 0)


def test_stats_of_the_core_count_everything() -> None:
    harness = CoreHarness(max_num_seqs=1, num_blocks=16)
    prompt = list(range(10))
    harness.add("a", prompt, max_tokens=2)
    harness.add("b", prompt, max_tokens=2)
    harness.add("c", prompt, max_tokens=2, prompt_logprobs=0)
    harness.step()
    stats = harness.core.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 2)
    assert (stats.num_blocks_total, stats.num_blocks_used, stats.num_blocks_cached) == (16, 3, 2)
    harness.run()
    stats = harness.core.stats()
    assert (stats.num_requests_accepted, stats.num_requests_finished) == (3, {FinishReason.LENGTH: 3})
    assert (stats.num_prompt_tokens, stats.num_output_tokens, stats.num_steps) == (30, 6, 6)
    assert (stats.num_prefix_cache_queried_tokens, stats.num_prefix_cache_hit_tokens) == (20, 8)


def test_salted_requests_share_only_among_themselves() -> None:
    harness = CoreHarness(max_num_seqs=1)
    prompt = list(range(10))
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "")):
        harness.add(name, prompt, max_tokens=1, cache_salt=salt)
    harness.run()
    cached = [harness.last(name).stats.num_cached_tokens for name in "abcd"]  # pyright: ignore
    assert cached == [0, 0, 8, 0]


def test_cancelled_requests_with_far_deadlines_are_not_kept() -> None:
    harness = CoreHarness()
    for index in range(500):
        request = EngineRequest(
            request_id=f"r{index}",
            prompt_token_ids=[1],
            sampling_params=SamplingParams(temperature=0.0),
            deadline_s=harness.clock.now_s + 1e6,
        )
        harness.core.add_request(request)
        harness.core.cancel(request.request_id)
    assert len(harness.core._deadlines._entries) < 50  # pyright: ignore[reportPrivateUsage]
    assert len(harness.core.step()) == 500
