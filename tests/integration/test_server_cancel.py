# SPDX-License-Identifier: Apache-2.0
"""Ending requests early on the real server: by RPC, by `stop`, by dying; the engine's books balance afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from typing import Any

import pytest
import tritonclient.grpc.aio as grpc_aio

from fakes.triton_calls import Stream, generate, open_stream, read
from fakes.triton_server import RunningServer

pytestmark = pytest.mark.server

_LONG = {"text_input": "import os\n", "max_tokens": 1500, "end_id": -1, "stream": True}
_LONG_IDS = {
    "input_ids": [5, 6, 7, 8],
    "input_lengths": 4,
    "request_output_len": 1500,
    "end_id": -1,
    "streaming": True,
}
_STOP_ENGINE = {"input_ids": [5], "input_lengths": 1, "request_output_len": 1, "stop": True}
# What a second of the specification covers, plus the wait for a step under load.
_FREE_WITHIN_S = 1.0


async def test_cancelled_call_frees_its_blocks(triton_server: RunningServer) -> None:
    async with grpc_aio.InferenceServerClient(triton_server.grpc_url) as client:
        call = await open_stream(client, "llm", _LONG)
        await read(call, Stream(), at_most=3)
        assert triton_server.stats().num_blocks_used > 0
        call.cancel()
        assert triton_server.wait_until_idle(_FREE_WITHIN_S).num_blocks_used == 0


@pytest.mark.parametrize(
    ("model", "inputs", "stop_model", "stop_inputs"),
    [
        ("engine", _LONG_IDS, "engine", _STOP_ENGINE),
        ("ensemble", _LONG, "engine", _STOP_ENGINE),
        ("llm", _LONG, "llm", {"text_input": "", "stop": True}),
    ],
)
async def test_stop_ends_the_stream_in_order(
    triton_server: RunningServer, model: str, inputs: dict[str, Any], stop_model: str, stop_inputs: dict[str, Any]
) -> None:
    async with grpc_aio.InferenceServerClient(triton_server.grpc_url) as client:
        call = await open_stream(client, model, inputs, request_id="to-stop")
        stream = await read(call, Stream(), at_most=3)
        stopped = await generate(triton_server.grpc_url, stop_model, stop_inputs, request_id="to-stop")
        assert (stopped.chunks, stopped.errors) == ([], [])
        assert triton_server.wait_until_idle(_FREE_WITHIN_S).num_blocks_used == 0
        await asyncio.wait_for(read(call, stream), 10)
    assert not stream.errors
    assert stream.chunks[-1].is_final


async def test_stop_without_an_id_is_refused(triton_server: RunningServer) -> None:
    stream = await generate(triton_server.grpc_url, "engine", _STOP_ENGINE)
    assert stream.errors == ["invalid: stop needs the id of the request to end; send it as this request's id"]


async def test_killed_client_frees_its_blocks(triton_server: RunningServer) -> None:
    code = (
        "import asyncio, sys\n"
        "import tritonclient.grpc.aio as grpc_aio\n"
        "from fakes.triton_calls import Stream, open_stream, read\n"
        "async def main():\n"
        "    async with grpc_aio.InferenceServerClient(sys.argv[1]) as client:\n"
        f"        call = await open_stream(client, 'llm', {_LONG!r})\n"
        "        await read(call, Stream(), at_most=3)\n"
        "        print('streaming', flush=True)\n"
        "        await read(call, Stream())\n"
        "asyncio.run(main())\n"
    )
    tests = __file__.rsplit("/", 2)[0]
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{code}", triton_server.grpc_url],
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"streaming\n"
        assert triton_server.stats().num_running == 1
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert triton_server.wait_until_idle(_FREE_WITHIN_S).num_blocks_used == 0


async def test_500_random_cancels_leave_the_books_balanced(triton_server: RunningServer) -> None:
    chance = random.Random(1)
    async with grpc_aio.InferenceServerClient(triton_server.grpc_url) as client:

        async def one(index: int) -> None:
            prompt = f"class Cancelled{index}:\n    "
            call = await open_stream(client, "llm", _LONG | {"text_input": prompt, "max_tokens": 64})
            if chance.random() < 0.3:  # before anything came back
                await asyncio.sleep(chance.random() * 0.05)
            else:
                await read(call, Stream(), at_most=chance.randrange(1, 8))
            call.cancel()

        for start in range(0, 500, 50):
            await asyncio.gather(*(one(index) for index in range(start, start + 50)))
    stats = triton_server.wait_until_idle(5.0)
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
    assert sum(stats.num_requests_finished.values()) == stats.num_requests_accepted
    # And the server still serves.
    stream = await generate(triton_server.grpc_url, "llm", _LONG | {"max_tokens": 4})
    assert stream.chunks[-1].is_final


async def test_cancelling_is_cheap_when_idle(triton_server: RunningServer) -> None:
    """Nothing polls while nothing runs: the models' processes use next to no processor time."""
    before = _cpu_ticks(triton_server.process.pid)
    await asyncio.sleep(1.0)
    assert _cpu_ticks(triton_server.process.pid) - before < 20


def _cpu_ticks(pid: int) -> int:
    """Processor time of a process's children, in hundredths of a second."""
    total = 0
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        for child in file.read().split():
            with open(f"/proc/{child}/stat", encoding="utf-8") as stat:
                fields = stat.read().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total
