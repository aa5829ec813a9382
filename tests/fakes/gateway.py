# SPDX-License-Identifier: Apache-2.0
"""A gateway on a real socket in the test's own loop, in front of a fake Triton server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from fakes.triton import FakeTriton, ReceivedRequest, reply, serve, tensor_response
from wavetrain_gateway.admission import Admission
from wavetrain_gateway.app import GatewayApp
from wavetrain_gateway.assembly import build_gateway
from wavetrain_gateway.server import GatewayServer, listen_on
from wavetrain_gateway.settings import GatewaySettings

MODEL = "m"
WORDS = ["one", " two", " three"]
TOKENIZER_INFO = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "chat_template": None}


@dataclass
class RunningGateway:
    """A gateway that takes connections."""

    app: GatewayApp
    server: GatewayServer
    port: int
    http: httpx.AsyncClient
    fake: FakeTriton
    serving: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})

    async def chat(self, content: Any = "hi", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields})

    @property
    def generations(self) -> list[ReceivedRequest]:
        """What reached `llm`, without the gateway's own canaries."""
        return [request for request in self.fake.requests if is_of_a_caller(request)]


def is_of_a_caller(request: ReceivedRequest) -> bool:
    return request.model == "llm" and not is_canary(request)


def is_canary(request: ReceivedRequest) -> bool:
    return request.inputs.get("text_input") == [b"1"]


def sampling(request: ReceivedRequest) -> dict[str, Any]:
    return json.loads(request.inputs["sampling_parameters"][0])


def events(body: str) -> list[Any]:
    """The data of a stream's events, "[DONE]" as it is."""
    found: list[Any] = []
    for line in body.splitlines():
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            found.append(text if text == "[DONE]" else json.loads(text))
    return found


@dataclass
class Model:
    """What the fake server's models do; `text` is the script of `llm`, canaries are answered without it."""

    text: Callable[[ReceivedRequest], AsyncIterator[Any]] | None = None
    words: list[str] = field(default_factory=lambda: list(WORDS))

    async def __call__(self, request: ReceivedRequest) -> AsyncIterator[Any]:
        if request.model == "tokenizer" and "return_tokenizer_info" in request.inputs:
            yield tensor_response(tokenizer_info=("BYTES", [1, 1], [json.dumps(TOKENIZER_INFO)]))
        elif request.model == "tokenizer":
            text = request.inputs.get("messages", request.inputs["text_input"])[0].decode()
            ids = [ord(char) % 256 for char in text]
            yield tensor_response(
                input_ids=("INT32", [1, len(ids)], ids),
                input_lengths=("INT32", [1, 1], [len(ids)]),
                max_model_len=("INT32", [1, 1], [2048]),
            )
        elif request.model == "detokenizer":
            text = "".join(chr(97 + number % 26) for number in request.inputs["token_ids"])
            yield tensor_response(text_output=("BYTES", [1, 1], [text]))
        elif is_canary(request):
            yield reply("x", "length")
        elif self.text is not None:
            async for response in self.text(request):
                yield response
        else:
            for index, word in enumerate(self.words):
                yield reply(word, "stop" if index == len(self.words) - 1 else None)


@asynccontextmanager
async def serve_gateway(
    script: Callable[[ReceivedRequest], AsyncIterator[Any]] | None = None,
    *,
    admission: Admission | None = None,
    **sections: Any,
) -> AsyncIterator[RunningGateway]:
    """Runs both; `sections` are gateway.toml's tables."""
    models = {"llm", "tokenizer", "detokenizer", "engine"}
    async with serve(FakeTriton(Model(script), models=models)) as fake:
        listen = {"drain_timeout_s": 5.0, **sections.pop("listen", {})}
        settings = GatewaySettings.model_validate(
            {"upstreams": [fake.url], "model": MODEL, "listen": listen, "log": {"access_log": False}, **sections}
        )
        app = build_gateway(settings, admission=admission)
        listener = listen_on("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = GatewayServer(app)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.has_started:
            await asyncio.sleep(0.005)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False) as client:
            gateway = RunningGateway(app, server, port, client, fake, serving)
            try:
                yield gateway
            finally:
                await client.aclose()
                server.stop()
                server.stop()
                await serving
