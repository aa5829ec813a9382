# SPDX-License-Identifier: Apache-2.0
"""The WebSocket, with a client of another make: many requests, cancels, resuming, refusals."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fakes.gateway import MODEL, RunningGateway, serve_gateway
from fakes.triton import ReceivedRequest, reply

_TIMEOUT_S = 10.0


def socket_to(gateway: RunningGateway, **options: Any) -> Any:
    return connect(f"ws://127.0.0.1:{gateway.port}/v1/stream", proxy=None, **options)


async def send(socket: ClientConnection, **frame: Any) -> None:
    await socket.send(json.dumps(frame))


async def ask(socket: ClientConnection, name: str, **fields: Any) -> None:
    await send(socket, type="request", id=name, api="completions", body={"model": MODEL, "prompt": name, **fields})


async def receive(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(await asyncio.wait_for(socket.recv(), _TIMEOUT_S))


async def receive_all(socket: ClientConnection, *names: str) -> dict[str, list[dict[str, Any]]]:
    """The frames of these requests, up to each one's last."""
    frames: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    running = set(names)
    while running:
        frame = await receive(socket)
        frames[frame["id"]].append(frame)
        if frame["type"] in {"done", "error"}:
            running.discard(frame["id"])
    return frames


def text_of(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["data"]["choices"][0]["text"] for frame in frames if frame["type"] == "event")


async def echoing(request: ReceivedRequest):
    name = request.inputs["text_input"][0].decode()
    for number in range(5):
        yield reply(f"{name}{number} ", "stop" if number == 4 else None)
        await asyncio.sleep(0.001)


async def endless(request: ReceivedRequest):
    number = 0
    while True:
        yield reply(f"{number} ")
        number += 1
        await asyncio.sleep(0.002)


async def test_many_requests_share_a_connection():
    async with serve_gateway(echoing) as gateway, socket_to(gateway) as socket:
        names = [f"r{number}" for number in range(20)]
        for name in names:
            await ask(socket, name)
        frames = await receive_all(socket, *names)
        for name in names:
            assert text_of(frames[name]) == "".join(f"{name}{number} " for number in range(5))
            assert [frame["event"] for frame in frames[name]] == list(range(1, len(frames[name]) + 1))
            assert frames[name][0]["type"] == "accepted"
            assert frames[name][-1]["usage"]["completion_tokens"] == 5


async def test_a_chat_streams_the_same_chunks_as_sse():
    async with serve_gateway() as gateway, socket_to(gateway, subprotocols=["wavetrain"]) as socket:
        assert socket.subprotocol == "wavetrain"
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        await send(socket, type="request", id="c", api="chat", body=body)
        frames = (await receive_all(socket, "c"))["c"]
        deltas = [frame["data"]["choices"][0]["delta"] for frame in frames if frame["type"] == "event"]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == "one two three"


async def test_cancel_ends_one_request_and_not_the_others():
    async with serve_gateway(endless) as gateway, socket_to(gateway) as socket:
        await ask(socket, "a", max_tokens=1000)
        await ask(socket, "b", max_tokens=1000)
        while (await receive(socket))["id"] != "b":
            pass
        await send(socket, type="cancel", id="a")
        frames = []
        while not frames or frames[-1]["type"] != "error":
            frame = await receive(socket)
            frames += [frame] if frame["id"] == "a" else []
        assert frames[-1]["error"]["code"] == "cancelled"
        while len(gateway.fake.cancelled) < 1:
            await asyncio.sleep(0.005)
        assert (await receive(socket))["id"] == "b"
        assert len(gateway.fake.cancelled) == 1
        socket.transport.abort()


async def test_a_broken_connection_is_resumed_without_a_lost_or_doubled_event():
    gate = asyncio.Event()

    async def script(request: ReceivedRequest):
        for number in range(10):
            yield reply(f"{number} ")
        await gate.wait()
        yield reply("end", "stop")

    async with serve_gateway(script) as gateway:
        async with socket_to(gateway) as first:
            await ask(first, "r")
            frames = [await receive(first) for _ in range(2)]
            first.transport.abort()
        gate.set()
        async with socket_to(gateway) as second:
            await send(second, type="resume", id="r", after=frames[-1]["event"])
            frames += (await receive_all(second, "r"))["r"]
            assert [frame["event"] for frame in frames] == list(range(1, len(frames) + 1))
            assert text_of(frames) == "".join(f"{number} " for number in range(10)) + "end"
            # Over, and still there to be read again.
            await send(second, type="resume", id="r", after=0)
            assert (await receive_all(second, "r"))["r"] == frames
            await send(second, type="resume", id="r", after=99)
            assert (await receive(second))["error"]["code"] == "events_gone"
        assert len(gateway.generations) == 1


async def test_what_nobody_comes_back_to_is_cancelled_and_forgotten():
    async with serve_gateway(endless, flow={"resume_s": 0.2}) as gateway:
        async with socket_to(gateway) as socket:
            await ask(socket, "r", max_tokens=1000)
            await receive(socket)
            socket.transport.abort()
        while not gateway.fake.cancelled:
            await asyncio.sleep(0.01)
        async with socket_to(gateway) as socket:
            code = "events_gone"
            while code == "events_gone":
                await send(socket, type="resume", id="r", after=10**9)
                code = (await receive(socket))["error"]["code"]
            assert code == "request_not_found"


@pytest.mark.parametrize(
    ("frame", "code", "words"),
    [
        ("{", "invalid_json", "JSON object"),
        ("[]", "invalid_json", "JSON object"),
        ({"type": "request"}, "invalid_value", "id must be"),
        ({"type": "request", "id": "a b"}, "invalid_value", "id must be"),
        ({"type": "nonsense", "id": "a"}, "invalid_value", "type must be"),
        ({"type": "request", "id": "a", "api": "chat"}, "invalid_value", "body must be"),
        ({"type": "request", "id": "a", "api": "x", "body": {}}, "invalid_value", "api must be"),
        ({"type": "request", "id": "a", "api": "chat", "body": {"x": 1}}, "unknown_parameter", "no field 'x'"),
        ({"type": "cancel", "id": "a"}, "request_not_found", "no such request"),
        ({"type": "resume", "id": "a", "after": True}, "invalid_value", "after must be"),
    ],
)
async def test_wrong_frames_get_an_error_and_the_connection_goes_on(frame, code, words):
    async with serve_gateway() as gateway, socket_to(gateway) as socket:
        await socket.send(frame if isinstance(frame, str) else json.dumps(frame))
        answer = await receive(socket)
        assert (answer["type"], answer["error"]["code"]) == ("error", code)
        assert words in answer["error"]["message"]
        await ask(socket, "fine")
        assert text_of((await receive_all(socket, "fine"))["fine"]) == "one two three"


async def test_an_id_is_used_once_and_requests_have_a_number():
    async with serve_gateway(endless, flow={"max_socket_requests": 2}) as gateway, socket_to(gateway) as socket:
        for name in ("a", "b", "a", "c"):
            await ask(socket, name, max_tokens=1000)
        codes = []
        while len(codes) < 2:
            frame = await receive(socket)
            codes += [frame["error"]["code"]] if frame["type"] == "error" else []
        assert codes == ["too_many_requests"] * 2
        await ask(socket, "unknown-model", model="none")
        while True:
            frame = await receive(socket)
            if frame["type"] == "error":
                break
        assert frame["error"]["code"] == "too_many_requests"
        socket.transport.abort()


async def test_failures_are_the_requests_own():
    async def script(request: ReceivedRequest):
        yield reply("some")
        yield "internal: it broke at /opt/x"

    async with serve_gateway(script) as gateway, socket_to(gateway) as socket:
        await ask(socket, "r")
        await ask(socket, "s", model="none")
        frames = await receive_all(socket, "r", "s")
        assert frames["r"][-1]["error"]["code"] == "internal_error"
        assert "/opt" not in str(frames["r"])
        assert frames["s"][-1]["error"]["code"] == "model_not_found"


async def test_a_reader_that_takes_nothing_is_cancelled():
    async def flood(request: ReceivedRequest):
        while True:
            yield reply("x" * 20_000)

    async with serve_gateway(flood, flow={"write_timeout_s": 0.3}) as gateway:
        socket = await socket_to(gateway, max_queue=1)
        await ask(socket, "r", max_tokens=100_000)
        await receive(socket)
        socket.transport.pause_reading()
        while not gateway.fake.cancelled:
            await asyncio.sleep(0.02)
        while gateway.app.services.lifecycle.num_active:
            await asyncio.sleep(0.01)
        socket.transport.abort()
        await socket.wait_closed()


async def test_pages_of_other_origins_are_refused():
    async with serve_gateway(listen={"allowed_origins": ["https://mine.example"]}) as gateway:
        with pytest.raises(InvalidStatus) as refused:
            await socket_to(gateway, origin="https://evil.example").__aenter__()
        assert refused.value.response.status_code == 403
        for origin in (f"http://127.0.0.1:{gateway.port}", "https://mine.example"):
            async with socket_to(gateway, origin=origin) as socket:
                await ask(socket, "r" + str(len(origin)))
                assert (await receive(socket))["type"] == "accepted"


async def test_draining_lets_requests_finish_and_closes():
    gate = asyncio.Event()

    async def script(request: ReceivedRequest):
        yield reply("some")
        await gate.wait()
        yield reply(" more", "stop")

    async with serve_gateway(script) as gateway, socket_to(gateway) as socket:
        await ask(socket, "r")
        assert (await receive(socket))["type"] == "accepted"
        gateway.server.stop()
        while not gateway.app.services.lifecycle.is_draining:
            await asyncio.sleep(0.005)
        await ask(socket, "late")
        gate.set()
        frames = await receive_all(socket, "r", "late")
        assert text_of(frames["r"]) == "some more"
        assert frames["late"][-1]["error"]["code"] == "draining"
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), _TIMEOUT_S)
