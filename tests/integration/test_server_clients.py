# SPDX-License-Identifier: Apache-2.0
"""Our own clients against the real server: whole answers, streams, several sequences, errors, giving up."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fakes.triton_server import RunningServer
from wavetrain_client import AsyncClient, Client, DeadlineExceeded, RequestRejected
from wavetrain_client.chunk import join_chunks

pytestmark = pytest.mark.server

_PROMPTS: dict[str, Any] = {"llm": "import os\n", "ensemble": "import os\n", "engine": [5, 6, 7]}
_GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
_FREE_WITHIN_S = 1.0


@pytest.mark.parametrize("model", _PROMPTS)
async def test_stream_and_whole_agree_for_one_and_for_several(triton_server: RunningServer, model: str) -> None:
    async with AsyncClient(triton_server.grpc_url) as client:
        one = await client.generate(_PROMPTS[model], model=model, **_GREEDY)
        several = await client.generate(_PROMPTS[model], model=model, n=3, logprobs=0, **_GREEDY)
        chunks = [chunk async for chunk in client.stream(_PROMPTS[model], model=model, n=3, **_GREEDY)]
    assert (one.num_output_tokens, one.finish_reason) == (12, "length")
    whole = one.token_ids or one.text
    assert [output.token_ids or output.text for output in several.outputs] == [whole] * 3
    assert [(output.num_output_tokens, output.finish_reason) for output in several.outputs] == [(12, "length")] * 3
    assert all(output.cumulative_logprob is not None for output in several.outputs)
    assert [output.token_ids or output.text for output in join_chunks("r", model, chunks).outputs] == [whole] * 3


@pytest.mark.parametrize("model", ["llm", "ensemble"])
async def test_many_streams_on_one_client_and_every_other_given_up(triton_server: RunningServer, model: str) -> None:
    async def read(client: AsyncClient, index: int) -> str:
        wishes = _GREEDY | {"max_tokens": 1500 if index % 2 else 24}
        async with client.stream(f"x = {index}\n", model=model, **wishes) as stream:
            text = (await anext(stream)).text
            return text if index % 2 else text + "".join([chunk.text async for chunk in stream])

    async with AsyncClient(triton_server.grpc_url) as client:
        texts = await asyncio.gather(*(read(client, index) for index in range(32)))
        singles = [await read(client, index) for index in (0, 14, 30)]
        assert [texts[index] for index in (0, 14, 30)] == singles
        assert triton_server.wait_until_idle(_FREE_WITHIN_S).num_blocks_used == 0


async def test_errors_have_their_class(triton_server: RunningServer) -> None:
    async with AsyncClient(triton_server.grpc_url) as client:
        for model in _PROMPTS:
            with pytest.raises(RequestRejected, match="max_tokens"):
                await client.generate(_PROMPTS[model], model=model, max_tokens=0)
        with pytest.raises(DeadlineExceeded):
            await client.generate("x", max_tokens=1500, ignore_eos=True, timeout_s=0.2)
        with pytest.raises(RequestRejected, match="is not found"):
            await client.generate("x", model="nope")
        assert await client.is_ready("llm")
        assert not await client.is_ready("nope")
    assert triton_server.wait_until_idle(_FREE_WITHIN_S).num_blocks_used == 0


def test_one_blocking_client_for_many_threads(triton_server: RunningServer) -> None:
    with Client(triton_server.grpc_url) as client, ThreadPoolExecutor(8) as pool:
        assert client.is_ready("llm")
        expected = client.generate("import os\n", **_GREEDY).text
        texts = list(pool.map(lambda _: client.generate("import os\n", **_GREEDY).text, range(16)))
        stream = client.stream("import os\n", **_GREEDY | {"max_tokens": 1500})
        next(stream)
        stream.close()
        assert texts == [expected] * 16
        assert triton_server.wait_until_idle(_FREE_WITHIN_S).num_blocks_used == 0
