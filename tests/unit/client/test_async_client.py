# SPDX-License-Identifier: Apache-2.0
"""The asyncio client against a scripted server on a real socket."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest

from fakes.triton import Abort, FakeTriton, legacy_reply, reply, serve
from wavetrain_client import (
    AsyncClient,
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerBusy,
    ServerFailed,
    StreamBroken,
)


async def count_up(request):
    """Says "0 1 2 ..." as llm would, as many words as max_tokens asks."""
    for number in range(4):
        yield reply(f"{number} ", "length" if number == 3 else None)


async def say_one_and_hang(request):
    yield reply("a") if request.model == "llm" else legacy_reply("a")
    await asyncio.Event().wait()


async def hang(request):
    await asyncio.Event().wait()
    yield


async def seen(event, timeout_s=5.0):
    """Waits for a threading event without blocking the loop that has to set it."""
    for _ in range(int(timeout_s / 0.01)):
        if event.is_set():
            return True
        await asyncio.sleep(0.01)
    return False


async def test_chunks_come_in_order_and_the_last_has_the_reason():
    async with serve(FakeTriton(count_up)) as fake, AsyncClient(fake.url) as client:
        chunks = [chunk async for chunk in client.stream("x", max_tokens=4)]
    assert "".join(chunk.text for chunk in chunks) == "0 1 2 3 "
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert fake.cancelled == []


async def test_generate_asks_for_one_response_and_returns_all():
    async def answer(request):
        yield reply("hello", "stop", num_tokens=5)

    async with serve(FakeTriton(answer)) as fake, AsyncClient(fake.url) as client:
        generation = await client.generate("x", request_id="r1", seed=3)
    assert (generation.text, generation.finish_reason, generation.num_output_tokens) == ("hello", "stop", 5)
    assert (generation.request_id, generation.num_input_tokens) == ("r1", 3)
    assert fake.requests[0].inputs["stream"] == [False]


async def test_a_hundred_streams_at_once_over_one_client_keep_apart():
    async def echo(request):
        for number in range(10):
            yield reply(f"{request.request_id}/{number} ", "stop" if number == 9 else None)

    async def read(client, name):
        return "".join([chunk.text async for chunk in client.stream("x", request_id=name)])

    async with serve(FakeTriton(echo)) as fake, AsyncClient(fake.url) as client:
        texts = await asyncio.gather(*(read(client, f"r{index}") for index in range(100)))
    assert texts == ["".join(f"r{index}/{number} " for number in range(10)) for index in range(100)]


async def test_giving_up_some_of_many_streams_leaves_the_others_alone():
    async def echo(request):
        yield reply("a")
        if int(request.request_id) % 2:
            await asyncio.Event().wait()
        yield reply("b", "stop")

    async def read(client, name):
        async with client.stream("x", request_id=name) as stream:
            text = (await anext(stream)).text
            if int(name) % 2:
                return text
            return text + "".join([chunk.text async for chunk in stream])

    async with serve(FakeTriton(echo)) as fake, AsyncClient(fake.url) as client:
        texts = await asyncio.gather(*(read(client, str(index)) for index in range(64)))
        assert texts == ["ab", "a"] * 32
        while len(fake.cancelled) < 32:
            await asyncio.wait_for(seen(fake.was_cancelled), 5)
            await asyncio.sleep(0.01)
    assert sorted(fake.cancelled, key=int) == [str(index) for index in range(1, 64, 2)]


async def test_two_clients_do_not_disturb_each_other():
    async with serve(FakeTriton(count_up)) as fake:
        first, second = AsyncClient(fake.url), AsyncClient(fake.url)
        stream = first.stream("x")
        assert (await anext(stream)).text == "0 "
        await second.generate("x")
        await second.close()
        assert (await anext(stream)).text == "1 "
        await first.close()


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("invalid: no", RequestRejected),
        ("not_found: no", RequestRejected),
        ("cancelled: no", Cancelled),
        ("deadline: no", DeadlineExceeded),
        ("dead: no", ServerFailed),
        ("internal: no", ServerFailed),
    ],
)
async def test_an_error_of_the_server_becomes_its_class_and_is_not_retried(message, kind):
    async def fail(request):
        yield message

    async with serve(FakeTriton(fail)) as fake, AsyncClient(fake.url) as client:
        stream = client.stream("x")
        with pytest.raises(kind, match=r"^no$"):
            await anext(stream)
        assert [chunk async for chunk in stream] == []
    assert len(fake.requests) == 1


async def test_an_unknown_model_is_named():
    async with serve(FakeTriton(count_up)) as fake, AsyncClient(fake.url) as client:
        with pytest.raises(RequestRejected, match="'nope' is not found"):
            await client.generate("x", model="nope")


async def test_busy_is_retried_until_there_is_room():
    async def busy_once(request):
        if len(fake.requests) == 1:
            yield "busy: the queue is full"
        else:
            yield reply("a", "stop")

    fake = FakeTriton(busy_once)
    async with serve(fake), AsyncClient(fake.url) as client:
        assert (await client.generate("x")).text == "a"
    assert len(fake.requests) == 2
    assert len({request.request_id for request in fake.requests}) == 1


async def test_busy_gives_up_after_max_retries():
    async def always_busy(request):
        yield "busy: the queue is full"

    async with serve(FakeTriton(always_busy)) as fake, AsyncClient(fake.url, max_retries=1) as client:
        with pytest.raises(ServerBusy):
            await client.generate("x")
    assert len(fake.requests) == 2


async def test_a_stream_that_breaks_in_the_middle_is_not_repeated():
    async def break_off(request):
        yield reply("a")
        raise Abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async with serve(FakeTriton(break_off)) as fake, AsyncClient(fake.url) as client:
        stream = client.stream("x")
        assert (await anext(stream)).text == "a"
        with pytest.raises(StreamBroken, match="gone"):
            await anext(stream)
    assert len(fake.requests) == 1


async def test_a_server_that_is_not_there_is_named_after_the_retries():
    async with AsyncClient("127.0.0.1:1", max_retries=1) as client:
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1.*is it started"):
            await client.generate("x")
        assert not await client.is_ready()


async def test_a_retry_finds_the_server_that_came_back():
    fake = FakeTriton(count_up)
    async with serve(fake):
        pass
    port = fake.port

    async def come_back():
        server = grpc.aio.server()
        from tritonclient.grpc import service_pb2_grpc

        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await asyncio.sleep(0.15)
        await server.start()
        return server

    async with AsyncClient(fake.url, max_retries=6) as client:
        generation, server = await asyncio.gather(client.generate("x"), come_back())
        await server.stop(grace=0)
    assert generation.text == "0 1 2 3 "


async def test_the_deadline_ends_the_stream_and_travels_with_the_request():
    async with serve(FakeTriton(say_one_and_hang)) as fake, AsyncClient(fake.url) as client:
        stream = client.stream("x", timeout_s=0.3)
        assert (await anext(stream)).text == "a"
        with pytest.raises(DeadlineExceeded, match="timeout_s"):
            await anext(stream)
        assert await seen(fake.was_cancelled)
    assert 0 < fake.requests[0].parameters["timeout_ms"] <= 300
    assert fake.requests[0].time_remaining_s is not None


@pytest.mark.parametrize("model", ["llm", "ensemble"])
@pytest.mark.parametrize("way", ["aclose", "close", "with", "drop", "break", "task", "client"])
async def test_giving_up_reaches_the_server(way, model):
    async with serve(FakeTriton(say_one_and_hang)) as fake:
        client = AsyncClient(fake.url)
        stream = client.stream("x", model=model, request_id="r1")
        assert (await anext(stream)).text == "a"
        if way == "aclose":
            await stream.aclose()
        elif way == "close":
            stream.close()
        elif way == "with":
            async with stream:
                pass
        elif way == "drop":
            del stream
            gc.collect()
        elif way == "break":
            del stream
            async for _ in client.stream("x", model=model, request_id="r1"):
                break
        elif way == "task":
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await client.close()
        assert await seen(fake.was_cancelled)
        assert fake.cancelled[0] == "r1"
        if model == "ensemble":
            assert await seen(fake.was_stopped)
            assert fake.stopped[0] == "r1"
        else:
            assert fake.stopped == []
        await client.close()


async def test_cancelling_generate_cancels_the_request():
    async with serve(FakeTriton(hang)) as fake, AsyncClient(fake.url) as client:
        task = asyncio.ensure_future(client.generate("x"))
        assert await seen(fake.started)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await seen(fake.was_cancelled)


async def test_a_request_given_up_before_its_first_response_is_stopped_twice():
    async with serve(FakeTriton(hang)) as fake, AsyncClient(fake.url) as client:
        task = asyncio.ensure_future(client.generate("x", model="ensemble", request_id="r1"))
        assert await seen(fake.started)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()
    assert fake.stopped == ["r1", "r1"]


async def test_a_reader_learns_that_someone_else_closed_the_stream():
    async with serve(FakeTriton(say_one_and_hang)) as fake, AsyncClient(fake.url) as client:
        stream = client.stream("x")
        await anext(stream)
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        stream.close()
        with pytest.raises(Cancelled, match="closed while it was read"):
            await reader
        assert [chunk async for chunk in stream] == []


async def test_a_legacy_stream_ends_with_a_chunk_that_has_the_reason():
    async def legacy(request):
        for _ in range(3):
            yield legacy_reply("a")

    async with serve(FakeTriton(legacy)) as fake, AsyncClient(fake.url) as client:
        chunks = [chunk async for chunk in client.stream("x", model="ensemble", max_tokens=3)]
        await asyncio.sleep(0.05)
    assert "".join(chunk.text for chunk in chunks) == "aaa"
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert fake.stopped == []


async def test_a_message_of_16_mib_passes():
    async def echo(request):
        yield reply(request.inputs["text_input"][0], "stop")

    text = "é" * (8 << 20)
    fake = FakeTriton(echo)
    async with serve(fake, max_message_bytes=-1), AsyncClient(fake.url) as client:
        assert (await client.generate(text)).text == text


async def test_readiness_of_server_and_model():
    async with serve(FakeTriton(count_up)) as fake, AsyncClient(fake.url) as client:
        assert await client.is_ready()
        assert await client.is_ready("llm")
        assert not await client.is_ready("nope")
        fake.is_ready = False
        assert not await client.is_ready("llm")


async def test_a_closed_client_says_so():
    async with AsyncClient() as client:
        pass
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        client.stream("x")


def test_a_client_of_another_loop_says_so():
    client = AsyncClient("127.0.0.1:1")
    assert asyncio.run(client.is_ready(timeout_s=1)) is False
    with pytest.raises(RuntimeError, match="one for each loop"):
        asyncio.run(client.is_ready())
