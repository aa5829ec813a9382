# SPDX-License-Identifier: Apache-2.0
"""Requests that do not go straight: gone clients, slow readers, time limits, cancels, broken replicas, draining."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket

import grpc
import httpx
import pytest

from fakes.gateway import MODEL, RunningGateway, events, serve_gateway
from fakes.triton import Abort, ReceivedRequest, reply
from wavetrain_gateway.app import GatewayApp
from wavetrain_gateway.bodies import LargeBodies
from wavetrain_gateway.server import GatewayServer, listen_on

_TIMEOUT_S = 10.0


class Endless:
    """A model that says a word whenever it is let, and for ever."""

    def __init__(self, word: str = "word ", pause_s: float = 0.002) -> None:
        self.word, self.pause_s = word, pause_s
        self.num_started = 0

    async def __call__(self, request: ReceivedRequest):
        self.num_started += 1
        while True:
            yield reply(self.word)
            await asyncio.sleep(self.pause_s)


async def silent(request: ReceivedRequest):
    await asyncio.Event().wait()
    yield reply("never")


async def until(is_true, what: str) -> None:
    async def wait() -> None:
        while not is_true():
            await asyncio.sleep(0.005)

    try:
        await asyncio.wait_for(wait(), _TIMEOUT_S)
    except asyncio.TimeoutError:
        pytest.fail(f"not within {_TIMEOUT_S} s: {what}")


def head_of(path: str, length: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def open_raw(gateway: RunningGateway, path: str = "/v1/completions", **fields) -> tuple:
    body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 100_000, **fields}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 24)
    writer.write(head_of(path, len(body)) + body)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_goes_away_ends_its_request_upstream(is_streamed, how):
    async with serve_gateway(Endless()) as gateway:
        reader, writer = await open_raw(gateway, stream=is_streamed)
        await until(lambda: gateway.generations, "the request upstream")
        if is_streamed:
            await reader.readuntil(b"word")
        if how == "reset":
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        gone_s = asyncio.get_running_loop().time()
        await until(lambda: gateway.fake.cancelled, "the cancel upstream")
        assert asyncio.get_running_loop().time() - gone_s < 2.0  # 10 ms on an idle machine; the bound is 250 ms
        await until(lambda: not gateway.app.services.lifecycle.num_active, "the request's end")


async def test_a_thousand_disconnects_leave_nothing_behind():
    async with serve_gateway(Endless()) as gateway:
        tasks = len(asyncio.all_tasks())
        for _ in range(20):
            pairs = await asyncio.gather(*[open_raw(gateway, stream=True) for _ in range(50)])
            for reader, writer in pairs:
                await reader.readuntil(b"HTTP/1.1 200")
                writer.transport.abort()
        await until(lambda: not gateway.app.services.lifecycle.num_active, "the requests' ends")
        await until(lambda: len(gateway.fake.cancelled) >= 1000, "the cancels upstream")
        await until(lambda: len(asyncio.all_tasks()) <= tasks + 10, "the tasks' ends")
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_a_slow_reader_gets_all_text_in_fewer_larger_events():
    words = [f"{number:05d}" * 200 for number in range(300)]

    async def script(request: ReceivedRequest):
        for word in words:
            yield reply(word)
        yield reply("", "stop")

    async with serve_gateway(script, flow={"max_buffered_chars": 4096}) as gateway:
        reader, writer = await open_raw(gateway, stream=True)
        writer.transport.pause_reading()
        await asyncio.sleep(0.3)
        writer.transport.resume_reading()
        raw = await reader.readuntil(b"[DONE]")
        writer.close()
        lines = [line for line in raw.split(b"\n") if line.startswith(b"data: {")]
        chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "".join(words)


@pytest.mark.parametrize("word", ["x" * 5000])
async def test_a_reader_that_takes_nothing_is_cancelled(word):
    flow = {"write_timeout_s": 0.4, "max_buffered_chars": 100_000}
    async with serve_gateway(Endless(word, 0.0), flow=flow) as gateway:
        quick = asyncio.create_task(gateway.http.get("/livez"))
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(reader, ("127.0.0.1", gateway.port))
        body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 100_000, "stream": True}).encode()
        await loop.sock_sendall(reader, head_of("/v1/completions", len(body)) + body)
        await until(lambda: gateway.fake.cancelled, "the cancel of what nobody reads")
        await until(lambda: not gateway.app.services.lifecycle.num_active, "the request's end")
        reader.close()
        assert (await quick).status_code == 200
        metrics = (await gateway.http.get("/metrics")).text
        assert 'error="reader_too_slow"' in metrics


async def test_no_token_in_time_is_503():
    async with serve_gateway(silent, flow={"queue_timeout_s": 0.2}) as gateway:
        for is_streamed in (False, True):
            answer = await gateway.complete(stream=is_streamed)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
            assert int(answer.headers["retry-after"]) >= 1
        await until(lambda: len(gateway.fake.cancelled) == 2, "the cancels upstream")


async def test_too_long_in_all_is_504_or_an_error_event():
    async with serve_gateway(Endless()) as gateway:
        headers = {"x-request-timeout-ms": "300"}
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 1000}
        whole = await gateway.http.post("/v1/completions", json=body, headers=headers)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
        streamed = await gateway.http.post("/v1/completions", json=body | {"stream": True}, headers=headers)
        *chunks, last = events(streamed.text)
        assert chunks
        assert last["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in streamed.text
        assert "event: error" in streamed.text


async def test_a_failure_in_mid_stream_is_an_error_event_and_no_done():
    async def script(request: ReceivedRequest):
        yield reply("some")
        raise Abort(grpc.StatusCode.UNAVAILABLE, "Socket closed /opt/secret/path.c")

    async with serve_gateway(script) as gateway:
        answer = await gateway.chat(stream=True)
        assert answer.status_code == 200
        *chunks, last = events(answer.text)
        assert chunks[1]["choices"][0]["delta"]["content"] == "some"
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "upstream_reset")
        assert "[DONE]" not in answer.text
        assert "/opt" not in answer.text
        assert (await gateway.complete()).status_code == 502


async def test_a_silent_stream_gets_comments():
    gate = asyncio.Event()

    async def script(request: ReceivedRequest):
        yield reply("some")
        await gate.wait()
        yield reply(" more", "stop")

    async with serve_gateway(script, flow={"ping_interval_s": 0.1}) as gateway:
        reader, writer = await open_raw(gateway, stream=True)
        await asyncio.wait_for(reader.readuntil(b": ping\n\n"), _TIMEOUT_S)
        gate.set()
        await asyncio.wait_for(reader.readuntil(b"[DONE]"), _TIMEOUT_S)
        writer.close()


async def test_a_request_is_cancelled_by_its_id():
    async with serve_gateway(Endless()) as gateway:
        headers = {"x-request-id": "mine"}
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 1000}
        running = asyncio.create_task(gateway.http.post("/v1/completions", json=body, headers=headers))
        await until(lambda: gateway.generations, "the request upstream")
        twice = await gateway.http.post("/v1/completions", json=body, headers=headers)
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "request_id_in_use")
        done = await gateway.http.post("/v1/requests/mine/cancel")
        assert done.json()["cancelled"] is True
        ended = await running
        assert (ended.status_code, ended.json()["error"]["code"]) == (499, "cancelled")
        assert (await gateway.http.post("/v1/requests/mine/cancel")).status_code == 404


async def test_no_replica_is_503_and_not_ready():
    async with serve_gateway(routing={"start_wait_s": 0.3, "health": {"probe_period_s": 0.05}}) as gateway:
        await until(lambda: gateway.fake.requests, "the canary")
        async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:

            async def is_ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            while not await is_ready():
                await asyncio.sleep(0.02)
            gateway.fake.is_ready = False
            while await is_ready():
                await asyncio.sleep(0.02)
            answer = await gateway.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
        assert int(answer.headers["retry-after"]) >= 1


async def test_draining_finishes_what_runs_and_refuses_the_rest():
    gate = asyncio.Event()

    async def script(request: ReceivedRequest):
        yield reply("some")
        await gate.wait()
        yield reply(" more", "stop")

    async with serve_gateway(script) as gateway:
        kept = httpx.AsyncClient(base_url=gateway.url, trust_env=False)
        await kept.get("/livez")
        reader, writer = await open_raw(gateway, stream=True)
        await reader.readuntil(b"some")
        gateway.server.stop()
        await until(lambda: gateway.app.services.lifecycle.is_draining, "draining")
        refused = await kept.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        ready = await kept.get("/readyz")
        assert ready.status_code == 503
        assert (await kept.get("/livez")).status_code == 200
        gate.set()
        rest = await asyncio.wait_for(reader.read(), _TIMEOUT_S)
        assert b" more" in rest
        assert b"[DONE]" in rest
        writer.close()
        await kept.aclose()
        await asyncio.wait_for(asyncio.shield(gateway.serving), _TIMEOUT_S)


async def test_a_second_signal_ends_running_requests_with_an_error():
    async with serve_gateway(Endless(), listen={"drain_timeout_s": 60.0}) as gateway:
        reader, writer = await open_raw(gateway, stream=True)
        await reader.readuntil(b"word")
        gateway.server.stop()
        gateway.server.stop()
        rest = await asyncio.wait_for(reader.read(), _TIMEOUT_S)
        assert b'"code": "server_shutdown"' in rest
        assert b"[DONE]" not in rest
        writer.close()
        await asyncio.wait_for(asyncio.shield(gateway.serving), _TIMEOUT_S)


async def test_headers_have_bounds_in_bytes_and_time():
    async with serve_gateway(caps={"max_header_bytes": 2048}, listen={"header_timeout_s": 0.3}) as gateway:
        for raw, status in (
            (b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"y" * 5000 + b"\r\n\r\n", b"431"),
            (b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 2000 + b"\r\n", b"431"),
            (b"NONSENSE\r\n\r\n", b"400"),
            (b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n", b"400"),
            (b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1x\r\n\r\n", b"400"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 24)
            writer.write(raw)
            answer = await asyncio.wait_for(reader.read(), _TIMEOUT_S)
            assert answer.startswith(b"HTTP/1.1 " + status), (raw[:40], answer[:100])
            writer.close()
        # A connection that never says what it wants is closed.
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 24)
        writer.write(b"GET /livez HTTP/1.1\r\n")
        assert await asyncio.wait_for(reader.read(), _TIMEOUT_S) == b""
        writer.close()


async def test_a_body_that_does_not_come_is_408():
    async with serve_gateway(flow={"body_timeout_s": 0.2}) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 24)
        writer.write(head_of("/v1/completions", 50) + b"{")
        answer = await asyncio.wait_for(reader.readuntil(b"request_timeout"), _TIMEOUT_S)
        assert answer.startswith(b"HTTP/1.1 408")
        writer.close()


ABUSIVE = {
    "token ids": {"prompt": [1] * 340_000},
    "wrong ids": {"prompt": [-1] * 250_000},
    "lists of lists": {"prompt": [[1]] * 200_000},
    "texts": {"prompt": ["x"] * 200_000},
    "fields": {f"k{number}": 1 for number in range(75_000)},
    "biases": {"logit_bias": {str(number): 1 for number in range(80_000)}},
    "wrong biases": {"logit_bias": {str(number): "x" for number in range(4000)}},
    "stops": {"stop": ["x"] * 200_000},
    "a long text": {"prompt": "x" * 1_000_000},
    "escapes": {"prompt": "\x01" * 170_000},
    "nested": {"stream_options": {"a": {"b": [{}] * 250_000}}},
    "long names": {"x" * 1_000_000: 1},
    "messages": {"messages": [{"role": "user", "content": "x"}] * 25_000},
}


async def test_abusive_bodies_are_answered_for_what_they_are():
    # How long each holds the event loop: scripts/bench_gateway_abuse.py.
    bodies = {name: json.dumps({"model": MODEL, "prompt": "x", **fields}).encode() for name, fields in ABUSIVE.items()}
    async with serve_gateway() as gateway:
        await gateway.complete()

        async def status_of(path: str, body: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 24)
            writer.write(head_of(path, len(body)) + body)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), _TIMEOUT_S)
            writer.close()
            return answer.split()[1]

        for name, body in bodies.items():
            status = await status_of("/v1/completions", body)
            # Token ids are too many once the gateway has learnt how many the model takes.
            right = {"token ids": {b"200", b"400"}, "a long text": {b"200"}, "escapes": {b"200"}}.get(name, {b"400"})
            assert status in right, (name, status)
        # Many at once, of which some wait for their turn.
        again = [bodies["escapes"], bodies["fields"], bodies["biases"]] * 4
        statuses = await asyncio.gather(*[status_of("/v1/completions", body) for body in again])
        assert statuses == [b"200", b"400", b"400"] * 4
        chat = json.dumps({"messages": [{"role": "user", "content": "x"}] * 5000}).encode()
        assert await status_of("/tokenize", chat) == b"400"
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_large_bodies_take_turns_and_small_ones_do_not():
    bodies, events = LargeBodies(), []

    async def parse(name: str, num_bytes: int) -> None:
        async with bodies.turn(num_bytes):
            events.append(name)

    async def bystander() -> None:
        for _ in range(20):
            events.append("bystander")
            await asyncio.sleep(0)

    large = [parse(f"large {number}", 1 << 20) for number in range(4)]
    await asyncio.gather(*large, bystander(), *[parse("small", 100) for _ in range(3)])
    assert [name for name in events if name.startswith("large")] == [f"large {number}" for number in range(4)]
    places = [events.index(f"large {number}") for number in range(4)]
    assert all("bystander" in events[first:second] for first, second in itertools.pairwise(places))
    assert max(index for index, name in enumerate(events) if name == "small") < places[1]


async def test_a_small_event_waits_for_no_acknowledgement():
    seen: list[int] = []

    class Looking(GatewayApp):
        async def __call__(self, scope, receive, send) -> None:
            if scope["type"] == "http":
                connection = scope["extensions"]["wavetrain.abort"].__self__.get_extra_info("socket")
                seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await super().__call__(scope, receive, send)

    async with serve_gateway() as gateway:
        listener = listen_on("127.0.0.1", 0)
        server = GatewayServer(Looking(gateway.app.services))
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve([listener]))
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{port}/livez")).status_code == 200
        server.stop()
        await serving
    assert seen == [1]
