# SPDX-License-Identifier: Apache-2.0
"""Streams of the real server: both text models, both protocols, many at once, every token in its place."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import tritonclient.grpc.aio as grpc_aio

from fakes.triton_calls import generate, generate_on, post, post_events
from fakes.triton_server import RunningServer
from wavetrain_engine import LLM, SamplingParams

pytestmark = pytest.mark.server

PROMPT = "def __init__(self"
# The engine may be ahead of a sender that has to wait for a core: so many tokens cannot end up in one response.
MANY_TOKENS = 200
# So hot that every token is equally likely: bytes of broken and whole multi-byte characters among them.
_NOISE = {"temperature": 1000.0, "max_tokens": 64, "end_id": -1}


@pytest.mark.parametrize("model", ["ensemble", "llm"])
async def test_stream_is_new_text_only_and_equals_the_whole(triton_server: RunningServer, model: str) -> None:
    inputs = {"text_input": PROMPT, "max_tokens": MANY_TOKENS}
    stream = await generate(triton_server.grpc_url, model, inputs | {"stream": True})
    whole = await generate(triton_server.grpc_url, model, inputs | {"exclude_input_in_output": True})
    assert not stream.errors
    assert len(stream.chunks) > 1
    assert [chunk.is_final for chunk in stream.chunks] == [False] * (len(stream.chunks) - 1) + [True]
    assert len(whole.chunks) == 1
    assert stream.text == whole.text


@pytest.mark.parametrize("model", ["ensemble", "llm"])
def test_generate_endpoints(triton_server: RunningServer, model: str) -> None:
    url = f"{triton_server.http_url}/v2/models/{model}"
    status, body = post(f"{url}/generate", {"text_input": PROMPT, "max_tokens": MANY_TOKENS})
    events = post_events(f"{url}/generate_stream", {"text_input": PROMPT, "max_tokens": MANY_TOKENS, "stream": True})
    assert status == 200
    assert len(events) > 1
    # Without streaming, both contracts put the prompt before the text by default.
    assert body["text_output"] == PROMPT + "".join(event["text_output"] for event in events)


async def test_ensemble_and_llm_agree_on_multibyte_noise(triton_server: RunningServer) -> None:
    texts: list[str] = []
    for seed in range(4):
        inputs = {"text_input": "naïve 日本語 🙂", "seed": seed, **_NOISE}
        streams = [
            await generate(triton_server.grpc_url, model, inputs | {"stream": True}) for model in ("ensemble", "llm")
        ]
        whole = await generate(triton_server.grpc_url, "llm", inputs | {"exclude_input_in_output": True})
        assert [stream.errors for stream in streams] == [[], []]
        assert streams[0].text == streams[1].text == whole.text
        texts.append(whole.text)
    assert any(ord(char) > 127 for char in "".join(texts))


async def test_ensemble_and_llm_agree_on_stop_words(triton_server: RunningServer) -> None:
    for model in ("ensemble", "llm"):
        base = {"text_input": PROMPT, "max_tokens": 32}
        full = (await generate(triton_server.grpc_url, model, base | {"stream": True})).text
        stop = full[len(full) // 2 : len(full) // 2 + 3]
        inputs = base | {"stop_words": ["never to be found", stop]}
        stream = await generate(triton_server.grpc_url, model, inputs | {"stream": True})
        whole = await generate(triton_server.grpc_url, model, inputs)
        assert stream.text == full[: full.index(stop)]
        assert whole.text == PROMPT + stream.text


async def test_64_streams_of_64_tokens_equal_the_offline_engine(
    triton_server: RunningServer, served_model: Path, served_dtype: str
) -> None:
    prompts = [f"def function_{index}(self, value):\n    " for index in range(64)]
    async with grpc_aio.InferenceServerClient(triton_server.grpc_url) as client:
        streams = await asyncio.gather(
            *(
                generate_on(
                    client,
                    "llm" if index % 2 else "ensemble",
                    {
                        "text_input": prompt,
                        "max_tokens": 64,
                        "temperature": 0.8,
                        "seed": index,
                        "end_id": -1,
                        "stream": True,
                        "return_num_output_tokens": True,
                    },
                )
                for index, prompt in enumerate(prompts)
            )
        )
    params = [
        SamplingParams(max_tokens=64, temperature=0.800000011920929, seed=index, ignore_eos=True) for index in range(64)
    ]
    with LLM(model=str(served_model), dtype=served_dtype, num_blocks=1024, max_num_seqs=64) as llm:
        expected = llm.generate(prompts[:56], params[:56])
        for prompt, alone in zip(prompts[56:], params[56:], strict=True):
            expected += llm.generate(prompt, alone)
    for stream, output in zip(streams, expected, strict=True):
        assert not stream.errors
        assert sum(int(chunk.outputs["num_output_tokens"].sum()) for chunk in stream.chunks) == 64
        assert stream.text == output.outputs[0].text
    assert triton_server.wait_until_idle(1.0).num_blocks_used == 0
