# SPDX-License-Identifier: Apache-2.0
"""The openai SDK, unchanged, against the gateway: asynchronous, streaming, raw, and its errors."""

from __future__ import annotations

import asyncio

import openai
import pytest

from fakes.gateway import MODEL, RunningGateway, serve_gateway
from fakes.triton import ReceivedRequest, reply


def sdk(gateway: RunningGateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0)


async def test_chats_and_completions():
    async with serve_gateway() as gateway, sdk(gateway) as client:
        messages = [{"role": "user", "content": "hi"}]
        chat = await client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=4)
        assert chat.choices[0].message.content == "one two three"
        assert chat.usage is not None
        assert chat.usage.prompt_tokens_details is not None
        text = await client.completions.create(model=MODEL, prompt=[1, 2], n=1, extra_body={"top_k": 3})
        assert text.choices[0].finish_reason == "stop"
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=messages)
        assert raw.headers["x-request-id"]
        assert raw.parse().id.startswith("chatcmpl-")
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "wavetrain"


async def test_streams():
    async with serve_gateway() as gateway, sdk(gateway) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"
        assert chunks[-1].usage is not None
        async with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "hi"}]) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].message.content == "one two three"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"n": 1000}, openai.BadRequestError),
        ({"extra_body": {"guided_json": {}}}, openai.BadRequestError),
    ],
)
async def test_refusals_are_the_sdks_errors(fields, kind):
    async with serve_gateway() as gateway, sdk(gateway) as client:
        with pytest.raises(kind) as refused:
            await client.completions.create(**{"model": MODEL, "prompt": "x", **fields})
        assert refused.value.request_id
        assert refused.value.body["param"]


async def test_a_broken_stream_raises():
    async def script(request: ReceivedRequest):
        yield reply("some")
        yield "internal: it broke"

    async with serve_gateway(script) as gateway, sdk(gateway) as client:
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine failed"):
            async for _ in stream:
                pass


async def test_leaving_a_stream_cancels_it():
    async def script(request: ReceivedRequest):
        while True:
            yield reply("word ")

    async with serve_gateway(script) as gateway, sdk(gateway) as client:
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=1000)
        async for _ in stream:
            break
        await stream.close()
        while gateway.app.services.lifecycle.num_active:
            await asyncio.sleep(0.01)
