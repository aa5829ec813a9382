# SPDX-License-Identifier: Apache-2.0
"""What can go wrong behind and before the gateway, on real sockets: whoever is not concerned notices nothing, and
whoever is gets one clear error.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.gateway import RunningGateway, events, serve_gateway
from fakes.redis_server import redis_server
from fakes.replica_process import ReplicaProcess, replica_processes
from fakes.replicas import QUICK, FakeReplica, serving, until
from fakes.triton import ReceivedRequest, reply
from wavetrain_gateway.keys import hash_key
from wavetrain_gateway.limits.keyed_admission import KeyedAdmission
from wavetrain_gateway.routing.replica import Replica
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream

pytestmark = pytest.mark.alone  # hundreds of calls at once, on processes that are killed

KEY, OTHER = "wt-first", "wt-second"
BEARER = {"authorization": f"Bearer {KEY}"}
NO_AFFINITY = {"max_index_chunks": 0}


def replicas_of(gateway: RunningGateway) -> list[Replica]:
    upstream = gateway.app.services.upstream
    assert isinstance(upstream, RoutedUpstream)
    return upstream.router.replicas.replicas


def admission_of(gateway: RunningGateway) -> KeyedAdmission:
    admission = gateway.app.services.admission
    assert isinstance(admission, KeyedAdmission)
    return admission


async def healthy(gateway: RunningGateway) -> None:
    await until(lambda: all(replica.health == "healthy" for replica in replicas_of(gateway)))


def is_idle(gateway: RunningGateway) -> bool:
    return all((replica.num_running, replica.outstanding_tokens) == (0, 0) for replica in replicas_of(gateway))


def routing(**more: Any) -> dict[str, Any]:
    # One retry for each of a crowd that a dying replica leaves behind is what these tests are about, not its budget.
    return {"health": QUICK, "balance": NO_AFFINITY, "retry": {"budget_free_per_s": 1000}, **more}


def key_file(tmp_path: Path, key: str = KEY, **settings: Any) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"key": [{"name": "k", "sha256": hash_key(key), **settings}]}), encoding="utf-8")
    return path


async def crowd(gateway: RunningGateway, prompt: str, count: int, **fields: Any) -> list[asyncio.Task[httpx.Response]]:
    """So many requests, running, spread over both replicas."""
    tasks = [asyncio.create_task(gateway.complete(prompt=prompt, max_tokens=20, **fields)) for _ in range(count)]
    await until(lambda: sum(replica.num_running for replica in replicas_of(gateway)) == count)
    assert all(replica.num_running > 0 for replica in replicas_of(gateway))
    return tasks


def whole(count: int) -> str:
    return "".join(f"w{number} " for number in range(count))


@pytest.fixture
def two() -> Iterator[list[ReplicaProcess]]:
    with replica_processes(2) as replicas:
        yield replicas


async def test_a_replica_killed_before_it_answered_costs_nobody_a_request(two: list[ReplicaProcess]) -> None:
    async with serve_gateway(upstreams=[replica.url for replica in two], routing=routing()) as gateway:
        await healthy(gateway)
        tasks = await crowd(gateway, "stall", 20)
        two[0].kill()
        two[1].go_on()
        answers = await asyncio.gather(*tasks)
        assert [answer.status_code for answer in answers] == [200] * 20
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {whole(20)}
        await until(lambda: replicas_of(gateway)[0].health == "unhealthy")
        assert is_idle(gateway)


async def test_a_replica_killed_in_mid_stream_ends_its_streams_with_an_error_and_no_others(
    two: list[ReplicaProcess],
) -> None:
    async with serve_gateway(upstreams=[replica.url for replica in two], routing=routing()) as gateway:
        await healthy(gateway)
        tasks = await crowd(gateway, "hang", 20, stream=True)
        lost = replicas_of(gateway)[0].num_running
        # Each has its first word: that is what makes the difference to the test above.
        await until(lambda: all(r.outstanding_tokens == 19 * r.num_running for r in replicas_of(gateway)))
        two[0].kill()
        await until(lambda: replicas_of(gateway)[0].num_running == 0)
        two[1].go_on()
        answers = [events(answer.text) for answer in await asyncio.gather(*tasks)]
        ended = [answer for answer in answers if answer[-1] == "[DONE]"]
        broken = [answer for answer in answers if answer[-1] != "[DONE]"]
        assert (len(ended), len(broken)) == (20 - lost, lost)
        for answer in ended:
            assert "".join(event["choices"][0]["text"] for event in answer[:-1]) == whole(20)
        for answer in broken:
            *before, last = answer
            assert "".join(event["choices"][0]["text"] for event in before) == "w0 "
            assert last["error"]["code"] == "upstream_reset"
            assert "127.0.0.1" not in json.dumps(last)
        assert (await gateway.complete(max_tokens=3)).json()["choices"][0]["text"] == whole(3)
        assert is_idle(gateway)


async def test_taking_a_replica_away_under_load_loses_nothing(two: list[ReplicaProcess]) -> None:
    async with serve_gateway(upstreams=[replica.url for replica in two], routing=routing()) as gateway:
        await healthy(gateway)
        upstream = gateway.app.services.upstream
        assert isinstance(upstream, RoutedUpstream)
        tasks = await crowd(gateway, "hang", 20)
        leaving = upstream.router.replicas.retire(replicas_of(gateway)[0].name)
        later = await asyncio.gather(*(gateway.complete(max_tokens=5) for _ in range(20)))
        assert leaving.counts.requests < 20
        for replica in two:
            replica.go_on()
        assert {answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*tasks)} == {whole(20)}
        assert {answer.json()["choices"][0]["text"] for answer in later} == {whole(5)}
        await until(lambda: not upstream.router.replicas.retiring)


async def test_limits_are_exact_to_the_request_under_200_at_once(tmp_path: Path) -> None:
    keys = {"file": key_file(tmp_path, requests_per_minute=61)}
    async with serve_gateway(keys=keys) as gateway:
        gateway.http.headers.update(BEARER)
        answers = await asyncio.gather(*(gateway.complete(max_tokens=3) for _ in range(200)))
        assert Counter(answer.status_code for answer in answers) == {200: 61, 429: 139}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["x-ratelimit-limit-requests"] == "61"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert 50 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert len(gateway.generations) == 61


async def test_streams_at_once_are_limited_and_freed_by_whatever_ends_them(tmp_path: Path) -> None:
    async def slow(request: ReceivedRequest) -> AsyncIterator[Any]:
        yield reply("one")
        await asyncio.Event().wait()

    keys = {"file": key_file(tmp_path, max_streams=5, tokens_per_minute=100_000)}
    async with serve_gateway(slow, keys=keys) as gateway:
        gateway.http.headers.update(BEARER)
        admission = admission_of(gateway)
        for _ in range(3):
            tasks = [asyncio.create_task(gateway.complete(max_tokens=3, stream=True)) for _ in range(5)]
            await until(lambda: replicas_of(gateway)[0].num_running == 5)
            assert (await gateway.complete(max_tokens=3)).json()["error"]["code"] == "too_many_streams"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: is_idle(gateway))
            await until(lambda: admission.num_running(hash_key(KEY)[:12]) == 0)


async def test_a_broken_key_file_changes_nothing_and_a_mended_one_does(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    async with serve_gateway(keys={"file": path}) as gateway:
        admission = admission_of(gateway)
        gateway.http.headers.update(BEARER)
        assert (await gateway.complete()).status_code == 200
        path.write_text("{", encoding="utf-8")
        await until(lambda: admission.num_key_file_errors == 1)
        assert (await gateway.complete()).status_code == 200
        path.unlink()
        await until(lambda: admission.num_key_file_errors == 2)
        assert (await gateway.complete()).status_code == 200
        key_file(tmp_path, OTHER)
        gateway.http.headers["authorization"] = f"Bearer {OTHER}"
        while (await gateway.complete()).status_code != 200:
            await asyncio.sleep(0.05)
        gateway.http.headers.update(BEARER)
        assert (await gateway.complete()).status_code == 401


async def test_redis_counts_for_all_gateways_and_its_end_is_survived(tmp_path: Path) -> None:
    path = key_file(tmp_path, requests_per_minute=50)
    with redis_server(tmp_path) as (url, process):
        keys = {"file": path, "redis_url": url, "redis_timeout_s": 2}
        async with serve_gateway(keys=keys) as one, serve_gateway(keys=keys) as other:
            for gateway in (one, other):
                gateway.http.headers.update(BEARER)
                admission = admission_of(gateway)
                while admission.is_store_down:  # it may have come up after the gateway
                    await asyncio.sleep(0.02)
            answers = await asyncio.gather(*((one, other)[n % 2].complete(max_tokens=3) for n in range(120)))
            assert Counter(answer.status_code for answer in answers) == {200: 50, 429: 70}
            process.kill()
            process.wait()
            # What it let in by Redis it has counted itself as well, and goes on from there.
            await asyncio.gather(*(one.complete(max_tokens=3) for _ in range(60)))
            assert len(one.generations) == 50


async def test_streams_are_counted_over_all_gateways(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def held(request: ReceivedRequest) -> AsyncIterator[Any]:
        yield reply("word")
        await gate.wait()
        yield reply(" more", "stop")

    path = key_file(tmp_path, max_streams=7)
    with redis_server(tmp_path) as (url, _):
        keys = {"file": path, "redis_url": url, "redis_timeout_s": 2}
        async with serve_gateway(held, keys=keys) as one, serve_gateway(held, keys=keys) as other:
            for gateway in (one, other):
                gateway.http.headers.update(BEARER)
            running = [asyncio.create_task((one, other)[number % 2].complete()) for number in range(40)]
            while sum(task.done() for task in running) < 33:
                await asyncio.sleep(0.02)
            refused = [task.result() for task in running if task.done()]
            assert {answer.json()["error"]["code"] for answer in refused} == {"too_many_streams"}
            await until(lambda: len(one.generations) + len(other.generations) == 7)
            gate.set()
            answers = await asyncio.gather(*running)
            assert Counter(answer.status_code for answer in answers) == {200: 7, 429: 33}
            again = await asyncio.gather(*(other.complete() for _ in range(7)))
            assert Counter(answer.status_code for answer in again) == {200: 7}


@pytest.mark.parametrize("is_silent", [False, True], ids=["refused", "silent"])
@pytest.mark.parametrize("when_down", ["open", "closed"])
async def test_without_redis_limits_are_open_or_closed_as_configured(
    when_down: str, is_silent: bool, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_silent:  # connections are taken, and nobody ever answers on them
            listener.listen(64)
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        keys = {"file": key_file(tmp_path, requests_per_minute=7), "redis_url": url, "redis_when_down": when_down}
        async with serve_gateway(keys=keys) as gateway:
            gateway.http.headers.update(BEARER)
            answers = await asyncio.gather(*(gateway.complete(max_tokens=3) for _ in range(20)))
            statuses = Counter(answer.status_code for answer in answers)
            assert statuses == ({200: 7, 429: 13} if when_down == "open" else {503: 20})
            if when_down == "closed":
                assert answers[0].json()["error"]["code"] == "limits_unavailable"
                assert "retry-after" in answers[0].headers


async def test_1000_disconnects_leave_nothing_behind(tmp_path: Path) -> None:
    async def endless(request: ReceivedRequest) -> AsyncIterator[Any]:
        while True:
            yield reply("word ")
            await asyncio.sleep(0.02)

    keys = {"file": key_file(tmp_path, max_streams=1000, tokens_per_minute=10**9)}
    fakes = [FakeReplica(endless), FakeReplica(endless)]
    async with serving(*fakes):
        upstreams = [fake.url for fake in fakes]
        async with serve_gateway(upstreams=upstreams, routing=routing(), keys=keys) as gateway:
            gateway.http.headers.update(BEARER)
            await healthy(gateway)
            for batch in range(10):
                await asyncio.gather(*(disconnect(gateway, number % 4) for number in range(100)))
                await until(lambda: is_idle(gateway))
                assert sum(len(fake.asked) for fake in fakes) <= 100 * (batch + 1)
            admission = admission_of(gateway)
            await until(lambda: admission.num_running(hash_key(KEY)[:12]) == 0)
            await until(lambda: all(len(fake.cancelled) == len(fake.asked) for fake in fakes))
            assert gateway.app.services.lifecycle.num_active == 0
            assert sum(replica.counts.failures for replica in replicas_of(gateway)) == 0
            for fake in fakes:
                fake.behave = FakeReplica().behave
            assert (await gateway.complete(max_tokens=3)).status_code == 200


async def disconnect(gateway: RunningGateway, how: int) -> None:
    """Sends a request and goes away: before the answer, in it, half closed, or with a reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    body = json.dumps({"model": "m", "prompt": "p", "max_tokens": 50, "stream": how != 3}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {KEY}"
    writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    if how in (1, 2):
        await reader.readuntil(b"data: ")
    if how == 2:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
    else:
        writer.close()


async def test_a_reader_that_takes_nothing_is_let_go_and_others_go_on() -> None:
    async def flood(request: ReceivedRequest) -> AsyncIterator[Any]:
        if request.inputs["text_input"] == [b"quick"]:
            yield reply("done", "stop")
            return
        while True:
            yield reply("x" * 10_000)
            await asyncio.sleep(0)

    flow = {"write_timeout_s": 0.3, "max_buffered_chars": 100_000}
    async with serve_gateway(flood, flow=flow, routing=routing()) as gateway:
        await healthy(gateway)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", gateway.port))
            body = b'{"model": "m", "prompt": "p", "max_tokens": 1000, "stream": true}'
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
            )
            await until(lambda: replicas_of(gateway)[0].num_running == 1)
            for _ in range(10):
                assert (await gateway.complete(prompt="quick")).json()["choices"][0]["text"] == "done"
            await until(lambda: is_idle(gateway))
        assert await asyncio.to_thread(gateway.fake.was_cancelled.wait, 30)


async def test_every_route_but_livez_and_the_empty_page_needs_a_key(tmp_path: Path) -> None:
    async with serve_gateway(keys={"file": key_file(tmp_path)}) as gateway:
        paths = set((await gateway.http.get("/openapi.json", headers=BEARER)).json()["paths"])
        paths |= {"/docs", "/openapi.json", "/metrics", "/livez", "/readyz", "/nothing", "/v1/models/m/x"}
        assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize"} <= paths
        # The page holds nothing but the field that a key is typed into.
        public = {("GET", "/livez"): 200, ("GET", "/"): 200, ("GET", "/page/{name}"): 404}
        for path in sorted(paths):
            for method in ("GET", "POST", "DELETE", "OPTIONS"):
                answer = await gateway.http.request(method, path.replace("{", "").replace("}", ""))
                # After some wrong keys an address has to wait, which lets nobody in either.
                expected = {public[method, path]} if (method, path) in public else {401, 429}
                assert answer.status_code in expected, (method, path)
