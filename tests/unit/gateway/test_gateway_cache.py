# SPDX-License-Identifier: Apache-2.0
"""The response cache: exact repeats only, streamed or whole, never across callers unless allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.gateway import events, serve_gateway
from wavetrain_gateway import redis_store
from wavetrain_gateway.admission import Caller, OpenAdmission
from wavetrain_gateway.response_cache import MemoryStore

_CACHE = {"is_enabled": True}


class Named(OpenAdmission):
    """The caller is who the header says."""

    def authenticate(self, headers: Mapping[str, str], client_host: str) -> Caller:
        return Caller(name=headers.get("x-name", "a"))


async def test_a_repeat_is_answered_without_a_replica():
    async with serve_gateway(cache=_CACHE) as gateway:
        first = await gateway.chat(temperature=0, logprobs=False)
        again = await gateway.chat(temperature=0, logprobs=False)
        assert (first.headers["x-wavetrain-cache"], again.headers["x-wavetrain-cache"]) == ("miss", "hit")
        assert first.json()["choices"] == again.json()["choices"]
        assert first.json()["usage"] == again.json()["usage"]
        assert again.json()["id"] == f"chatcmpl-{again.headers['x-request-id']}"
        assert len(gateway.generations) == 1
        streamed = await gateway.chat(
            temperature=0, stream=True, stream_options={"include_usage": True}, logprobs=False
        )
        assert streamed.headers["x-wavetrain-cache"] == "hit"
        *chunks, usage, done = events(streamed.text)
        assert (done, usage["usage"]["completion_tokens"]) == ("[DONE]", 3)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta.get("content", "") for delta in deltas) == "one two three"


async def test_what_was_streamed_first_is_kept_too():
    async with serve_gateway(cache=_CACHE) as gateway:
        await gateway.complete(seed=3, stream=True)
        again = await gateway.complete(seed=3)
        assert again.headers["x-wavetrain-cache"] == "hit"
        assert again.json()["choices"][0]["text"] == "one two three"


async def test_only_exact_repeats_of_deterministic_requests():
    async with serve_gateway(cache=_CACHE) as gateway:
        assert "x-wavetrain-cache" not in (await gateway.complete()).headers
        base: dict[str, Any] = {"temperature": 0}
        await gateway.complete(**base)
        for other in (
            {"prompt": "ho"},
            {"max_tokens": 3},
            {"stop": ["x"]},
            {"n": 2},
            {"cache_salt": "s"},
            {"echo": True},
        ):
            answer = await gateway.complete(**base, **other)
            assert answer.headers["x-wavetrain-cache"] == "miss", other


async def test_callers_do_not_share_unless_allowed():
    for is_shared, expected in ((False, "miss"), (True, "hit")):
        async with serve_gateway(cache=_CACHE | {"is_shared": is_shared}, admission=Named()) as gateway:
            body = {"model": "m", "prompt": "x", "temperature": 0}
            await gateway.http.post("/v1/completions", json=body, headers={"x-name": "a"})
            other = await gateway.http.post("/v1/completions", json=body, headers={"x-name": "b"})
            assert other.headers["x-wavetrain-cache"] == expected


async def test_failures_are_not_kept():
    async def script(request):
        yield "internal: no"

    async with serve_gateway(script, cache=_CACHE) as gateway:
        for _ in range(2):
            answer = await gateway.complete(temperature=0)
            assert (answer.status_code, answer.headers["x-wavetrain-cache"]) == (500, "miss")


class Broken:
    """A store that is not there."""

    async def get(self, key: str) -> bytes | None:
        raise ConnectionError("gone")

    async def set(self, key: str, value: bytes) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass


async def test_a_store_that_fails_is_a_miss():
    failures: list[BaseException] = []
    async with serve_gateway(cache=_CACHE) as gateway:
        cache = gateway.app.services.cache
        cache._store, cache._on_failure = Broken(), failures.append
        answer = await gateway.complete(temperature=0)
        assert (answer.status_code, answer.headers["x-wavetrain-cache"]) == (200, "miss")
    assert [type(failure) for failure in failures] == [ConnectionError, asyncio.TimeoutError]


async def test_gateways_share_their_answers_on_redis(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redis_store, "Redis", fakeredis.FakeAsyncRedis)
    cache = {**_CACHE, "redis_url": "redis://shared.test:6379/3"}
    async with serve_gateway(cache=cache) as one, serve_gateway(cache=cache) as other:
        first, again = await one.complete(temperature=0), await other.complete(temperature=0)
        assert (first.headers["x-wavetrain-cache"], again.headers["x-wavetrain-cache"]) == ("miss", "hit")
        assert first.json()["choices"] == again.json()["choices"]
        assert other.generations == []
    store = redis_store.RedisStore(cache["redis_url"], ttl_s=0.05)
    await store.set("k", b"v")
    assert await store.get("k") == b"v"
    while await store.get("k") is not None:
        await asyncio.sleep(0.01)
    await store.close()


async def test_a_redis_that_is_gone_is_a_miss():
    async with serve_gateway(cache={**_CACHE, "redis_url": "redis://127.0.0.1:1"}) as gateway:
        for _ in range(2):
            answer = await gateway.complete(temperature=0)
            assert (answer.status_code, answer.headers["x-wavetrain-cache"]) == (200, "miss")


async def test_answers_expire():
    now_s = 0.0
    store = MemoryStore(ttl_s=10, max_bytes=1000, clock=lambda: now_s)
    await store.set("k", b"v")
    now_s = 9.0
    assert await store.get("k") == b"v"
    now_s = 11.0
    assert await store.get("k") is None
    assert store.num_bytes == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60)), max_size=60))
def test_the_store_never_holds_more_than_its_bound(writes):
    async def check() -> None:
        store = MemoryStore(ttl_s=10, max_bytes=100)
        for key, size in writes:
            await store.set(key, b"x" * size)
            assert store.num_bytes <= 100
            assert await store.get(key) == b"x" * size

    asyncio.run(check())
