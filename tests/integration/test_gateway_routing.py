# SPDX-License-Identifier: Apache-2.0
"""Routing as callers see it: names, rules, prefixes; over HTTP, with fake replicas and with the real Triton server."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest

from bench_prefix_affinity import WAYS, make_trace, open_by, run_trace
from fakes.caching_replica import CachingReplica
from fakes.gateway import RunningGateway, serve_gateway
from fakes.replicas import QUICK, FakeReplica, all_healthy, serving, until
from fakes.triton_server import RunningServer
from wavetrain_client import AsyncClient, GenerationRequest
from wavetrain_gateway.assembly import build_admin
from wavetrain_gateway.keys import hash_key
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream, make_upstream
from wavetrain_gateway.routing.settings import RoutingSettings

ADMIN = {"authorization": "Bearer admin"}


def upstream_of(gateway: RunningGateway) -> RoutedUpstream:
    upstream = gateway.app.services.upstream
    assert isinstance(upstream, RoutedUpstream)
    return upstream


def routing_file(tmp_path: Path, small: FakeReplica, large: FakeReplica) -> Path:
    path = tmp_path / "routing.json"
    table = {
        "replica": [
            {"name": "s", "url": small.url, "model": "small"},
            {"name": "l", "url": large.url, "model": "large"},
        ],
        "alias": {"gpt-4o-mini": "small"},
        "rule": [
            {"name": "auto", "tiers": ["premium"], "targets": [{"model": "large"}]},
            {"name": "auto", "min_prompt_tokens": 200, "targets": [{"model": "large"}]},
            {"name": "auto", "targets": [{"model": "small"}]},
            {"name": "canary", "targets": [{"model": "small", "weight": 3}, {"model": "large", "weight": 1}]},
        ],
    }
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


async def test_names_rules_and_tiers_decide_who_answers(tmp_path: Path) -> None:
    small, large = FakeReplica(), FakeReplica()
    keys = tmp_path / "keys.json"
    entries = [
        {"name": "plain", "sha256": hash_key("plain")},
        {"name": "premium", "sha256": hash_key("premium"), "tier": "premium"},
        {"name": "only", "sha256": hash_key("only"), "models": ["gpt-4o-mini"]},
    ]
    keys.write_text(json.dumps({"key": entries}), encoding="utf-8")
    async with serving(small, large):
        routing = {"file": routing_file(tmp_path, small, large), "health": QUICK}
        async with serve_gateway(routing=routing, keys={"file": keys}) as gateway:

            async def answerer(key: str, model: str, prompt: str = "hello") -> str:
                before = len(small.asked), len(large.asked)
                headers = {"authorization": f"Bearer {key}"}
                fields = {"model": model, "prompt": prompt, "max_tokens": 5}
                answer = await gateway.http.post("/v1/completions", json=fields, headers=headers)
                if answer.status_code != 200:
                    return answer.json()["error"]["code"]
                assert answer.json()["model"] == model
                return "s" if len(small.asked) > before[0] else "l"

            assert await answerer("plain", "small") == "s"
            assert await answerer("plain", "large") == "l"
            assert await answerer("plain", "gpt-4o-mini") == "s"
            assert await answerer("plain", "auto") == "s"
            assert await answerer("plain", "auto", "a long prompt " * 200) == "l"
            assert await answerer("premium", "auto") == "l"
            assert await answerer("plain", "none") == "model_not_found"
            assert await answerer("only", "gpt-4o-mini") == "s"
            assert await answerer("only", "small") == "model_not_allowed"
            shares = Counter([await answerer("plain", "canary") for _ in range(80)])
            assert 5 <= shares["l"] <= 40
            headers = {"authorization": "Bearer plain"}
            listed = (await gateway.http.get("/v1/models", headers=headers)).json()["data"]
            assert {card["id"]: card["root"] for card in listed} == {
                "small": "small",
                "large": "large",
                "gpt-4o-mini": "small",
                "auto": "auto",
                "canary": "canary",
            }


async def test_callers_priorities_and_salts_reach_the_engine(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    entries = [{"name": tier, "sha256": hash_key(tier), "tier": tier} for tier in ("premium", "default", "batch")]
    keys.write_text(json.dumps({"key": entries}), encoding="utf-8")
    async with serve_gateway(keys={"file": keys}) as gateway:
        for key in ("premium", "default", "batch"):
            headers = {"authorization": f"Bearer {key}"}
            fields = {"model": "m", "prompt": "p"}
            assert (await gateway.http.post("/v1/completions", json=fields, headers=headers)).status_code == 200
        sent = [request.parameters for request in gateway.generations]
        assert [item.get("request_priority") for item in sent] == [-10, 0, 10]
        assert len({item["cache_salt"] for item in sent}) == 3


async def test_the_admin_moves_replicas_of_a_running_gateway() -> None:
    first, second = FakeReplica(), FakeReplica()
    async with serving(first, second):
        routing = {"health": QUICK}
        async with serve_gateway(upstreams=[first.url], routing=routing) as gateway:
            app = build_admin(gateway.app, "admin")
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin", headers=ADMIN) as admin:
                added = await admin.post("/replicas", json={"name": "new", "url": second.url, "model": "m"})
                assert added.status_code == 201
                await all_healthy(upstream_of(gateway))
                await admin.delete(f"/replicas/{first.url}")
                for _ in range(5):
                    assert (await gateway.complete(max_tokens=3)).status_code == 200
                assert (len(first.asked), len(second.asked)) == (0, 5)
                await until(lambda: not upstream_of(gateway).router.replicas.retiring)


@pytest.mark.server
async def test_a_dead_replica_beside_the_real_server_costs_nobody_a_request(triton_server: RunningServer) -> None:
    retry = {"budget_free_per_s": 1000}
    gone = FakeReplica()
    async with serving(gone):
        upstreams = [triton_server.grpc_url, gone.url]
        upstream = make_upstream(
            RoutingSettings.model_validate({"retry": retry, "health": {"probe_period_s": 3600}}),
            upstreams=upstreams,
            model="m",
        )
        await upstream.start()
        await all_healthy(upstream)
    async with serve_gateway() as gateway:
        # The upstream is made before one of its servers dies, and so does not know of it.
        object.__setattr__(gateway.app.services, "upstream", upstream)
        try:
            answers = await asyncio.gather(*(gateway.complete(prompt=f"def f{n}(", max_tokens=8) for n in range(16)))
            assert [answer.status_code for answer in answers] == [200] * 16
            assert all(answer.json()["usage"]["completion_tokens"] > 0 for answer in answers)
            assert upstream.router.counts["retries"] > 0
            assert [card.max_model_len is not None for card in upstream.models()] == [True]
        finally:
            await upstream.close()


async def test_prefix_affinity_finds_more_in_the_cache_than_random_routing_does() -> None:
    """20 shared prompts over two replicas, by the engine's own cache manager; the script does it with real servers."""
    trace = make_trace(num_shared=20, num_requests=200, shared_words=120, own_words=10)
    rates: dict[str, float] = {}
    for way in WAYS:
        fakes = [CachingReplica(num_blocks=150), CachingReplica(num_blocks=150)]  # each for half of them, and some
        async with serving(*fakes):
            open_job, upstreams = open_by(way, [fake.url for fake in fakes], random.Random(0))
            for upstream in upstreams:
                await upstream.start()
            result = await run_trace(open_job, trace, concurrency=4, max_tokens=4, salt="s")
            rates[way] = result.hit_rate
            for upstream in upstreams:
                await upstream.close()
    assert rates["affinity"] > 0.7
    assert rates["affinity"] > rates["random"] + 0.15
    assert rates["affinity"] > rates["load"] + 0.15


@pytest.mark.server
async def test_a_canary_does_not_stay_in_the_way_on_the_real_server(triton_server: RunningServer) -> None:
    async with AsyncClient(triton_server.grpc_url) as client:
        request = GenerationRequest(prompt="1", options={"max_tokens": 1}, priority=-1_000_000, cache_salt="canary")
        async with client.open(request) as stream:
            assert [chunk.finish_reason async for chunk in stream][-1] == "length"
