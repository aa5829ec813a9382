# SPDX-License-Identifier: Apache-2.0
"""What lm-eval sends and reads, on the real Triton server; docs/gateway-clients.md has the clients' own runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest

from fakes.compiled_kernels import are_compiled_kernels_to_be_had
from fakes.triton_server import RunningServer
from wavetrain_engine import LLM, SamplingParams
from wavetrain_engine.text.tokenizer import Tokenizer
from wavetrain_gateway.assembly import build_gateway
from wavetrain_gateway.server import GatewayServer, listen_on
from wavetrain_gateway.settings import GatewaySettings

pytestmark = pytest.mark.server

# A context and continuations, as an evaluation has them: of several lengths, and one of characters that the
# tokenizer cuts into bytes, whose texts are alike.
CHOICES = [
    ("def __init__(self, name):\n    self.name =", [" name", " None", " self"]),
    ("class Error(", ["Exception):", "1):"]),
    ("with open(filename, 'rb') as", [" f:\n    data = f.read()", " 0:"]),
    ("print('", ["é – 漢字 😀')", "')"]),
]
# The same numbers in any batch where kernels are compiled; elsewhere sums may be ordered otherwise.
TOLERANCE = 1e-6 if are_compiled_kernels_to_be_had() else 1e-3
BATCH_SIZE = 4


@asynccontextmanager
async def running_gateway(upstream: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that is ready, in the test's own loop."""
    settings = GatewaySettings.model_validate({"upstreams": [upstream], "model": "demo", "log": {"access_log": False}})
    listener = listen_on("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = GatewayServer(build_gateway(settings))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.has_started:
        await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        try:
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            yield client
        finally:
            await client.aclose()
            server.stop()
            await serving


async def token_ids(client: httpx.AsyncClient, text: str) -> list[int]:
    body = {"model": "demo", "prompt": text, "add_special_tokens": False}
    answer = await client.post("/tokenize", json=body)
    return answer.raise_for_status().json()["tokens"]


def read_answer(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """The sum and whether it is the model's own choice, as `local-completions` computes them of token_logprobs."""
    found: list[tuple[float, bool]] = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        # The last one is the token that max_tokens 1 makes.
        tokens = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(tokens), all(one == max(top.values()) for one, top in zip(tokens, tops, strict=True))))
    return found


def offline(model: Path, dtype: str, asked: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """The same two of the offline API's prompt log-probabilities."""
    found: list[tuple[float, bool]] = []
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    with LLM(model=str(model), dtype=dtype, num_blocks=256, max_num_seqs=16) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params)
    for output, (ids, length) in zip(outputs, asked, strict=True):
        assert output.prompt_logprobs is not None
        positions = output.prompt_logprobs[length:]
        entries = [(position or {})[token] for position, token in zip(positions, ids[length:], strict=True)]
        found.append((sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)))
    return found


async def test_lm_evals_loglikelihoods_are_the_offline_ones(
    triton_server: RunningServer, served_model: Path, served_dtype: str
) -> None:
    asked: list[tuple[list[int], int]] = []
    found: list[tuple[float, bool]] = []
    async with running_gateway(triton_server.grpc_url) as client:
        for context, continuations in CHOICES:
            start = await token_ids(client, context)
            asked += [(start + await token_ids(client, text), len(start)) for text in continuations]
        for begin in range(0, len(asked), BATCH_SIZE):
            batch = asked[begin : begin + BATCH_SIZE]
            body = {
                "model": "demo",
                "prompt": [ids for ids, _ in batch],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            }
            answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
            found += read_answer(answer, [length for _, length in batch])
    expected = await asyncio.to_thread(offline, served_model, served_dtype, asked)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=TOLERANCE)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in found} == {True, False}


async def test_lm_evals_generations_end_at_their_strings(triton_server: RunningServer) -> None:
    async with running_gateway(triton_server.grpc_url) as client:
        prompts = [await token_ids(client, text) for text in ("def close(self):\n    self.", "import sys\n")]
        # As `generate_until` asks: the end of a sequence is among the strings to stop at.
        body = {
            "prompt": prompts,
            "model": "demo",
            "max_tokens": 16,
            "temperature": 0,
            "stop": ["\n", "<|eos|>"],
            "seed": 1234,
        }
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all("\n" not in choice["text"] for choice in answer["choices"])


async def test_lm_evals_remote_tokenizer_is_the_checkpoints_own(
    triton_server: RunningServer, served_model: Path
) -> None:
    """What lm-eval does with `tokenizer_backend=remote`: no request names a model."""
    tokenizer = Tokenizer.load(served_model)
    async with running_gateway(triton_server.grpc_url) as client:

        async def encode(text: str) -> list[int]:
            answer = await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
            return answer.raise_for_status().json()["tokens"]

        info = (await client.get("/tokenizer_info")).raise_for_status().json()
        assert [(await encode(info[name]))[0] for name in ("eos_token", "bos_token")] == [
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
        ]
        text = "def é(x):\n    return '日本'"
        ids = await encode(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        answer = await client.post("/detokenize", json={"tokens": ids})
        assert answer.raise_for_status().json() == {"prompt": text}
        messages = [{"role": "user", "content": "add(a, b)"}]
        rendered = (
            jinja2.Environment()
            .from_string(info["chat_template"])
            .render(
                messages=messages,
                add_generation_prompt=True,
                **{name: info[name] for name in ("bos_token", "eos_token")},
            )
        )
        chat = await client.post("/tokenize", json={"messages": messages})
        assert await encode(rendered) == chat.json()["tokens"]
