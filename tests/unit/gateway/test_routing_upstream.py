# SPDX-License-Identifier: Apache-2.0
"""Routing over real sockets to fake servers: health, choice, retries before the first byte and never after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from fakes.replicas import FakeReplica, all_healthy, is_canary, job, routed, serving, table_of, text_of, until, words
from fakes.triton import Abort, FakeTriton, ReceivedRequest, reply
from wavetrain_client import (
    ChatPrompt,
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerBusy,
    ServerFailed,
    StreamBroken,
)
from wavetrain_gateway.errors import NotFound, Unavailable
from wavetrain_gateway.routing import routed_stream
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream, make_upstream
from wavetrain_gateway.routing.routing_table import RoutingTable
from wavetrain_gateway.routing.settings import RoutingSettings


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_stream, "_FIRST_DELAY_S", 0.001)


def always(*items: Any) -> Any:
    async def script(request: ReceivedRequest) -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return script


async def hang(request: ReceivedRequest) -> AsyncIterator[Any]:
    yield reply("begun")
    await asyncio.Event().wait()


async def test_a_request_waits_for_the_first_check_and_is_answered() -> None:
    fake = FakeReplica()
    async with serving(fake), routed(table_of(fake)) as upstream:
        assert await text_of(upstream, job()) == ("one two three", "a")
        assert await upstream.is_ready()
        assert [(card.id, card.max_model_len) for card in upstream.models()] == [("m", 64)]
        assert fake.asked[0].inputs["text_input"] == [b"p"]
        replica = upstream.router.replicas.replicas[0]
        assert (replica.num_running, replica.outstanding_tokens, replica.counts.requests) == (0, 0, 1)


async def test_tokenizing_asks_a_replica() -> None:
    fake = FakeReplica()
    async with serving(fake), routed(table_of(fake, alias={"other": "m"})) as upstream:
        found = await upstream.tokenize("other", "ab", timeout_s=10)
        assert (tuple(found.token_ids), found.max_model_len) == ((5, 6), 64)
        chat = ChatPrompt(messages=({"role": "user", "content": "x"},))
        assert tuple((await upstream.tokenize_chat("m", chat, timeout_s=10)).token_ids) == (5, 6)
        assert await upstream.detokenize("m", [5], timeout_s=10) == "text"
        with pytest.raises(NotFound):
            await upstream.tokenize("none", "ab", timeout_s=10)


async def test_unknown_models_are_refused_and_unready_ones_later() -> None:
    fake = FakeReplica()
    fake.is_ready = False
    async with serving(fake), routed(table_of(fake)) as upstream:
        with pytest.raises(NotFound, match="no model 'none'"):
            upstream.open(job(model="none"))
        with pytest.raises(Unavailable, match="no replica of the model"):
            await text_of(upstream, job())
        assert not await upstream.is_ready()
        fake.is_ready = True
        await all_healthy(upstream)
        assert (await text_of(upstream, job()))[0] == "one two three"
        fake.is_ready = False
        await until(lambda: upstream.router.replicas.replicas[0].health == "unhealthy")
        with pytest.raises(Unavailable):
            await text_of(upstream, job())


async def test_a_replica_that_is_ready_and_generates_nothing_is_not_used() -> None:
    async def never(request: ReceivedRequest) -> AsyncIterator[Any]:
        yield "internal: the engine is stuck"

    bad, good = FakeTriton(never), FakeReplica()
    async with serving(bad, good), routed(table_of(bad, good)) as upstream:
        await until(lambda: len(bad.requests) > 2)
        assert {(await text_of(upstream, job()))[1] for _ in range(10)} == {"b"}
        assert all(is_canary(request) for request in bad.requests)


async def test_a_canary_is_not_sent_where_others_are_answered() -> None:
    fake = FakeReplica()
    settings = {"health": {"probe_period_s": 0.001, "canary_period_s": 0.001}}
    async with serving(fake), routed(table_of(fake), **settings) as upstream:
        await until(lambda: sum(map(is_canary, fake.requests)) > 3)
        assert upstream.router.replicas.replicas[0].health == "healthy"
    quiet = FakeReplica()
    async with serving(quiet), routed(table_of(quiet)) as upstream:
        await all_healthy(upstream)
        await text_of(upstream, job())
        assert sum(map(is_canary, quiet.requests)) == 1


async def test_a_server_that_is_gone_costs_nobody_a_request() -> None:
    gone, there = FakeReplica(), FakeReplica()
    async with serving(there):
        async with serving(gone):
            table = table_of(gone, there)
            upstream = RoutedUpstream(table, RoutingSettings())
            await upstream.start()
            await all_healthy(upstream)
        try:
            for _ in range(10):
                assert await text_of(upstream, job()) == ("one two three", "b")
            assert upstream.router.counts["retries"] >= 1
            assert upstream.router.replicas.replicas[0].counts.failures >= 1
        finally:
            await upstream.close()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (always("busy: the queue is full"), ServerBusy),
        (always("dead: the engine died"), ServerFailed),
        (always(Abort(grpc.StatusCode.UNAVAILABLE, "going away")), ConnectionFailed),
    ],
)
async def test_what_was_not_answered_is_sent_to_another(script: Any, error: type[Exception]) -> None:
    bad, good = FakeReplica(script), FakeReplica()
    async with serving(bad, good), routed(table_of(bad, good)) as upstream:
        await all_healthy(upstream)
        answers = [await text_of(upstream, job()) for _ in range(8)]
        assert set(answers) == {("one two three", "b")}
    alone = FakeReplica(script)
    async with serving(alone), routed(table_of(alone)) as upstream:
        with pytest.raises(error):
            await text_of(upstream, job())
        assert len(alone.asked) == (2 if error is ServerFailed else 3)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (always("invalid: no"), RequestRejected),
        (always("internal: numbers"), ServerFailed),
        (always(reply("one"), Abort(grpc.StatusCode.UNAVAILABLE, "gone")), StreamBroken),
        (always(reply("one"), "dead: the engine died"), ServerFailed),
    ],
)
async def test_what_cannot_be_sent_again_is_not(script: Any, error: type[Exception]) -> None:
    first, second = FakeReplica(script), FakeReplica(script)
    async with serving(first, second), routed(table_of(first, second)) as upstream:
        await all_healthy(upstream)
        with pytest.raises(error):
            await text_of(upstream, job())
        assert len(first.asked) + len(second.asked) == 1
        assert upstream.router.counts["retries"] == 0


async def test_a_request_that_kills_engines_is_given_two_at_most() -> None:
    fakes = [FakeReplica(always("dead: the engine died")) for _ in range(4)]
    async with serving(*fakes), routed(table_of(*fakes), retry={"max_retries": 9}) as upstream:
        await all_healthy(upstream)
        with pytest.raises(ServerFailed):
            await text_of(upstream, job())
        assert sum(len(fake.asked) for fake in fakes) == 2


async def test_retries_have_a_budget() -> None:
    fake = FakeReplica(always("busy: full"))
    retry = {"budget_ratio": 0.0, "budget_free_per_s": 0.3}
    async with serving(fake), routed(table_of(fake), retry=retry) as upstream:
        for _ in range(10):
            with pytest.raises(ServerBusy):
                await text_of(upstream, job())
        assert len(fake.asked) == 13
        assert upstream.router.counts["retries_refused"] == 9


async def test_callers_cannot_have_replicas_taken_out() -> None:
    fake = FakeReplica(always("internal: numbers"))
    async with serving(fake), routed(table_of(fake)) as upstream:
        for _ in range(20):
            with pytest.raises(ServerFailed):
                await text_of(upstream, job())
        fake.behave = words
        assert (await text_of(upstream, job()))[0] == "one two three"


async def test_a_replica_that_fails_and_fails_is_left_alone_and_tried_again() -> None:
    bad, good = FakeReplica(always("dead: the engine died")), FakeReplica()
    breaker = {"num_failures": 3, "first_open_s": 0.001, "max_open_s": 0.001, "min_requests": 1000}
    async with serving(bad, good), routed(table_of(bad, good), breaker=breaker) as upstream:
        await all_healthy(upstream)
        for _ in range(10):
            await text_of(upstream, job())
        replica = upstream.router.replicas.replicas[0]
        assert replica.breaker.state != "closed" or replica.counts.failures < 3
        bad.behave = words
        await until_used(upstream, "a")
        assert replica.breaker.state == "closed"


async def until_used(upstream: RoutedUpstream, name: str) -> None:
    while (await text_of(upstream, job()))[1] != name:
        await asyncio.sleep(0.001)


async def test_outliers_are_taken_out_but_never_the_last_replica() -> None:
    bad, good = FakeReplica(always("dead: the engine died")), FakeReplica()
    breaker = {"num_failures": 1000, "min_requests": 3, "first_ejection_s": 3600}
    retry = {"budget_free_per_s": 1000}
    async with serving(bad, good), routed(table_of(bad, good), breaker=breaker, retry=retry) as upstream:
        await all_healthy(upstream)
        replicas = upstream.router.replicas
        while not replicas.is_ejected(replicas.replicas[0]):
            await text_of(upstream, job())
        assert len(bad.asked) == 3
        good.behave = always("dead: the engine died")
        for _ in range(10):
            with pytest.raises(ServerFailed):
                await text_of(upstream, job())
        assert not replicas.is_ejected(replicas.replicas[1])


async def test_leaving_early_cancels_and_frees_what_was_reserved() -> None:
    fake = FakeReplica(hang)
    async with serving(fake), routed(table_of(fake)) as upstream:
        replica = upstream.router.replicas.replicas[0]
        async with upstream.open(job(num_prompt_tokens=100, max_output_tokens=50)) as stream:
            await anext(stream)
            # The prompt is worked off, and one token of the output.
            assert (replica.num_running, replica.outstanding_tokens) == (1, 49)
        assert (replica.num_running, replica.outstanding_tokens) == (0, 0)
        assert await asyncio.to_thread(fake.was_cancelled.wait, 30)
        task = asyncio.create_task(text_of(upstream, job()))
        await until(lambda: len(fake.asked) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (replica.num_running, replica.outstanding_tokens) == (0, 0)
        assert replica.counts.failures == 0


async def test_the_time_limit_holds_over_all_attempts() -> None:
    fake = FakeReplica(always("busy: full"))
    retry = {"max_retries": 10, "budget_free_per_s": 1000}
    async with serving(fake), routed(table_of(fake), retry=retry) as upstream:
        await all_healthy(upstream)
        with pytest.raises((ServerBusy, DeadlineExceeded)):
            await text_of(upstream, job(timeout_s=0.05))
        assert len(fake.asked) < 11
        limits = [request.parameters["timeout_ms"] for request in fake.asked]
        assert limits == sorted(limits, reverse=True)
        assert all(limit <= 50 for limit in limits)


async def test_equal_beginnings_go_to_one_replica_and_others_are_spread() -> None:
    fakes = [FakeReplica(), FakeReplica()]
    async with serving(*fakes), routed(table_of(*fakes)) as upstream:
        await all_healthy(upstream)
        prompts = {number: f"{number:02} " * 100 for number in range(20)}
        seen: dict[int, set[str]] = {number: set() for number in prompts}
        for turn in range(4):
            for number, prompt in prompts.items():
                seen[number].add((await text_of(upstream, job(f"{prompt} question {turn}")))[1])
        assert all(len(names) == 1 for names in seen.values())
        assert len(set.union(*seen.values())) == 2
        assert sum(replica.counts.affine for replica in upstream.router.replicas.replicas) == 60
        salted = {(await text_of(upstream, job(prompts[0], cache_salt=f"{n}")))[1] for n in range(20)}
        assert salted == {"a", "b"}  # another tenant's prefix is nobody's gain


async def test_many_at_once_are_spread_over_idle_replicas() -> None:
    fakes = [FakeReplica(hang), FakeReplica(hang)]
    async with serving(*fakes), routed(table_of(*fakes)) as upstream:
        await all_healthy(upstream)
        streams = [upstream.open(job(f"prompt {number}")) for number in range(20)]
        for stream in streams:
            await anext(stream)
        assert [replica.num_running for replica in upstream.router.replicas.replicas] == [10, 10]
        for stream in streams:
            await stream.__aexit__(None, None, None)
        assert [replica.num_running for replica in upstream.router.replicas.replicas] == [0, 0]


async def test_a_target_without_replicas_is_stood_in_for() -> None:
    small, large = FakeReplica(), FakeReplica()
    small.is_ready = False
    async with serving(small, large):
        table = RoutingTable.model_validate(
            {
                "replica": [{"url": small.url, "model": "small"}, {"url": large.url, "model": "large"}],
                "rule": [{"name": "auto", "targets": [{"model": "small"}, {"model": "large", "weight": 0}]}],
            }
        )
        async with routed(table) as upstream:
            assert (await text_of(upstream, job(model="auto")))[1] == large.url
            small.is_ready = True
            await all_healthy(upstream)
            assert (await text_of(upstream, job(model="auto")))[1] == small.url
            assert {card.id: card.root for card in upstream.models()} == {
                "auto": "auto",
                "small": "small",
                "large": "large",
            }


def test_upstreams_of_the_command_line_become_replicas() -> None:
    upstream = make_upstream(RoutingSettings(), upstreams=["h:1", "h:2"], model="m")
    assert [replica.name for replica in upstream.router.replicas.of_model("m")] == ["h:1", "h:2"]
    with pytest.raises(ValueError, match=r"the upstreams: replica\[0\].url: 'h' is no server address"):
        make_upstream(RoutingSettings(), upstreams=["h"], model="m")
