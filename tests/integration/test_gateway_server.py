# SPDX-License-Identifier: Apache-2.0
"""The gateway in front of the real Triton server: the openai SDK in its kinds, curl, a harness that evaluates."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from fakes.triton_server import RunningServer
from wavetrain_gateway.assembly import build_gateway
from wavetrain_gateway.server import GatewayServer, listen_on
from wavetrain_gateway.settings import GatewaySettings

pytestmark = pytest.mark.server

PROMPT = "def __init__(self"
MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@dataclass
class Gateway:
    """A gateway in a thread, with a loop of its own."""

    url: str
    http: httpx.Client
    sdk: openai.OpenAI


@pytest.fixture(scope="module")
def gateway(triton_server: RunningServer) -> Iterator[Gateway]:
    loop = asyncio.new_event_loop()
    is_up = threading.Event()
    found: list[tuple[int, GatewayServer]] = []

    async def run() -> None:
        settings = GatewaySettings.model_validate(
            {"upstreams": [triton_server.grpc_url], "model": "demo", "log": {"access_log": False}}
        )
        listener = listen_on("127.0.0.1", 0)
        server = GatewayServer(build_gateway(settings), on_ready=is_up.set)
        found.append((listener.getsockname()[1], server))
        await server.serve([listener])

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert is_up.wait(20)
    port, server = found[0]
    url = f"http://127.0.0.1:{port}"
    http = httpx.Client(base_url=url, timeout=60, trust_env=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as sdk:
        while http.get("/readyz").status_code != 200:
            pass
        yield Gateway(url, http, sdk)
    http.close()
    loop.call_soon_threadsafe(server.stop)
    thread.join(30)
    loop.close()


def direct(server: RunningServer, **sampling: object) -> str:
    """The same text from the server itself."""
    body = {"text_input": PROMPT, "stream": False, "sampling_parameters": json.dumps(sampling)}
    body["exclude_input_in_output"] = True
    answer = httpx.post(f"{server.http_url}/v2/models/llm/generate", json=body, timeout=60)
    return answer.json()["text_output"]


def test_a_completion_is_the_servers_own_text(gateway: Gateway, triton_server: RunningServer) -> None:
    expected = direct(triton_server, **GREEDY)
    whole = gateway.sdk.completions.create(model="demo", prompt=PROMPT, **GREEDY)
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = gateway.sdk.completions.create(model="demo", prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_token_ids_are_the_same_prompt(gateway: Gateway) -> None:
    ids = gateway.http.post("/tokenize", json={"model": "demo", "prompt": PROMPT}).json()
    assert ids["max_model_len"] > 0
    text = gateway.sdk.completions.create(model="demo", prompt=PROMPT, **GREEDY).choices[0].text
    assert gateway.sdk.completions.create(model="demo", prompt=ids["tokens"], **GREEDY).choices[0].text == text
    back = gateway.http.post("/detokenize", json={"model": "demo", "tokens": ids["tokens"]}).json()
    assert back == {"prompt": PROMPT}


def test_a_chat_is_its_template_continued(gateway: Gateway) -> None:
    ids = gateway.http.post("/tokenize", json={"model": "demo", "messages": MESSAGES}).json()["tokens"]
    expected = gateway.sdk.completions.create(model="demo", prompt=ids, **GREEDY).choices[0].text
    chat = gateway.sdk.chat.completions.create(model="demo", messages=MESSAGES, **GREEDY)
    assert chat.choices[0].message.content == expected
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(ids)
    stream = gateway.sdk.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


async def test_the_asynchronous_sdk_streams_many_at_once(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:

        async def text_of(prompt: str) -> str:
            stream = await client.completions.create(model="demo", prompt=prompt, stream=True, **GREEDY)
            return "".join([chunk.choices[0].text async for chunk in stream])

        prompts = [f"def f{number}(" for number in range(16)]
        together = await asyncio.gather(*map(text_of, prompts))
        assert together[3] == await text_of(prompts[3])
        assert all(together)


def test_an_evaluation_harness_reads_the_prompts_probabilities(gateway: Gateway) -> None:
    # As lm-eval's `local-completions` asks, and as it reads the answer.
    ids = [
        gateway.http.post("/tokenize", json={"model": "demo", "prompt": text}).json()["tokens"]
        for text in ("import os", "x = 1")
    ]
    body = {
        "model": "demo",
        "prompt": ids,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = gateway.http.post("/v1/completions", json=body).json()["choices"]
    for choice, tokens in zip(sorted(choices, key=lambda item: item["index"]), ids, strict=True):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(tokens) + 1
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        for logprob, top in zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True):
            assert logprob <= 0
            assert max(top.values()) >= logprob - 1e-6
    whole = gateway.http.post("/v1/completions", json=body | {"prompt": ids[0]}).json()["choices"][0]
    pairs = zip(whole["logprobs"]["token_logprobs"][1:], choices[0]["logprobs"]["token_logprobs"][1:], strict=True)
    assert all(math.isclose(one, other, abs_tol=0.05) for one, other in pairs)


def test_curl_streams(gateway: Gateway) -> None:
    body = json.dumps({"model": "demo", "prompt": PROMPT, "stream": True, "max_tokens": 4})
    command = ["curl", "-sN", f"{gateway.url}/v1/completions", "-H", "content-type: application/json", "-d", body]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=60)
    assert ended.stdout.startswith("data: {")
    assert ended.stdout.endswith("data: [DONE]\n\n")


def test_leaving_ends_the_request_in_the_engine(gateway: Gateway, triton_server: RunningServer) -> None:
    for is_streamed in (True, False):
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": is_streamed}
        if is_streamed:
            with gateway.http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                gateway.http.post("/v1/completions", json=body, timeout=0.3)
        stats = triton_server.wait_until_idle(10)
        assert stats.num_running + stats.num_waiting == 0


def test_the_engines_refusals_are_openais_errors(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.sdk.completions.create(model="demo", prompt="x " * 5000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        gateway.sdk.completions.create(model="demo", prompt=[1 << 30], max_tokens=1)


def test_a_salt_keeps_prefixes_apart(gateway: Gateway) -> None:
    prompt = "import sys\n" * 20 + "# a salt of its own"

    def cached(salt: str) -> int:
        body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        answer = gateway.http.post("/v1/completions", json=body).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0
