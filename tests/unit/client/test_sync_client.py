# SPDX-License-Identifier: Apache-2.0
"""The blocking client against a scripted server on a real socket, served by another thread."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from fakes.triton import Abort, FakeTriton, legacy_reply, reply, serve_in_thread
from wavetrain_client import (
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerBusy,
    StreamBroken,
)

WAIT_S = 5.0


async def echo(request):
    """Says "name/0 name/1 ...", ten chunks."""
    for number in range(10):
        yield reply(f"{request.request_id}/{number} ", "stop" if number == 9 else None)


async def say_one_and_hang(request):
    yield reply("a") if request.model == "llm" else legacy_reply("a")
    await asyncio.Event().wait()


def test_chunks_come_in_order_and_the_last_has_the_reason():
    with serve_in_thread(FakeTriton(echo)) as fake, Client(fake.url) as client:
        chunks = list(client.stream("x", request_id="r"))
    assert "".join(chunk.text for chunk in chunks) == "".join(f"r/{number} " for number in range(10))
    assert chunks[-1].finish_reason == "stop"
    assert fake.cancelled == []


def test_generate_from_several_threads_over_one_client():
    with serve_in_thread(FakeTriton(echo)) as fake, Client(fake.url) as client, ThreadPoolExecutor(8) as pool:
        names = [f"r{index}" for index in range(40)]
        generations = list(pool.map(lambda name: client.generate("x", request_id=name), names))
    assert [generation.text.split("/")[0] for generation in generations] == names
    assert all(generation.num_output_tokens == 10 for generation in generations)


def test_errors_have_their_class_and_message():
    async def fail(request):
        yield "invalid: max_tokens must be between 1 and 9, got 0"

    with serve_in_thread(FakeTriton(fail)) as fake, Client(fake.url) as client:
        stream = client.stream("x")
        with pytest.raises(RequestRejected, match=r"^max_tokens must be"):
            next(stream)
        assert list(stream) == []


def test_busy_is_retried_only_before_the_first_response():
    async def busy(request):
        if len(fake.requests) == 2:
            yield reply("a")
        yield "busy: the queue is full"

    fake = FakeTriton(busy)
    with serve_in_thread(fake), Client(fake.url) as client:
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(ServerBusy):
            next(stream)
    assert len(fake.requests) == 2


def test_a_stream_that_breaks_in_the_middle_is_not_repeated():
    async def break_off(request):
        yield reply("a")
        raise Abort(grpc.StatusCode.UNAVAILABLE, "gone")

    with serve_in_thread(FakeTriton(break_off)) as fake, Client(fake.url) as client:
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(StreamBroken, match="gone"):
            next(stream)
    assert len(fake.requests) == 1


def test_a_server_that_is_not_there_is_named():
    with Client("127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(ConnectionFailed, match="is it started"):
            client.generate("x")
        assert not client.is_ready()


def test_the_deadline_ends_the_stream():
    with serve_in_thread(FakeTriton(say_one_and_hang)) as fake, Client(fake.url) as client:
        stream = client.stream("x", timeout_s=0.3)
        assert next(stream).text == "a"
        with pytest.raises(DeadlineExceeded):
            next(stream)
        assert fake.was_cancelled.wait(WAIT_S)


@pytest.mark.parametrize("model", ["llm", "ensemble"])
@pytest.mark.parametrize("way", ["close", "with", "drop", "client"])
def test_giving_up_reaches_the_server(way, model):
    with serve_in_thread(FakeTriton(say_one_and_hang)) as fake:
        client = Client(fake.url)
        stream = client.stream("x", model=model, request_id="r1")
        assert next(stream).text == "a"
        if way == "close":
            stream.close()
            assert list(stream) == []
        elif way == "with":
            with stream:
                pass
        elif way == "drop":
            del stream
            gc.collect()
        else:
            client.close()
        assert fake.was_cancelled.wait(WAIT_S)
        if model == "ensemble":
            assert fake.was_stopped.wait(WAIT_S)
            assert fake.stopped == ["r1"]
        client.close()
    assert (fake.cancelled, fake.stopped) == (["r1"], ["r1"] if model == "ensemble" else [])


@pytest.mark.parametrize("closes", ["stream", "client"])
def test_another_thread_may_close_what_is_being_read(closes):
    with serve_in_thread(FakeTriton(say_one_and_hang)) as fake, Client(fake.url) as client:
        stream = client.stream("x")
        next(stream)
        timer = threading.Timer(0.1, stream.close if closes == "stream" else client.close)
        timer.start()
        with pytest.raises(Cancelled, match="closed while it was read"):
            next(stream)
        timer.join()


def test_readiness():
    with serve_in_thread(FakeTriton(echo)) as fake, Client(fake.url) as client:
        assert client.is_ready()
        assert client.is_ready("llm")
        assert not client.is_ready("nope")


def test_a_closed_client_says_so():
    client = Client()
    client.close()
    client.close()
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        client.generate("x")


def test_a_script_that_forgets_to_close_ends_quietly_and_its_request_too():
    script = (
        "import sys; from wavetrain_client import Client\n"
        "stream = Client(sys.argv[1]).stream('x', model='ensemble')\n"
        "print(next(stream).text)\n"
    )
    with serve_in_thread(FakeTriton(say_one_and_hang)) as fake:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, fake.url], capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.stderr, done.returncode) == ("a\n", "", 0)
        assert fake.was_cancelled.wait(WAIT_S)


def test_the_client_needs_neither_torch_nor_the_engine():
    script = (
        "import sys, wavetrain_client\n"
        "print([name for name in ('torch', 'wavetrain_engine', 'wavetrain_kernels', 'gevent') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
