# SPDX-License-Identifier: Apache-2.0
"""Fake Triton servers as replicas behind the gateway's routing: they answer canaries, and scripts for all else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fakes.triton import FakeTriton, ReceivedRequest, Script, reply, serve, tensor_response
from wavetrain_client import GenerationRequest
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream
from wavetrain_gateway.routing.routing_table import RoutingTable
from wavetrain_gateway.routing.settings import RoutingSettings
from wavetrain_gateway.upstream import Job

# Checks follow each other closely, so that tests need not wait for them.
QUICK = {"probe_period_s": 0.01, "canary_period_s": 3600.0, "probe_timeout_s": 10.0}


def is_canary(request: ReceivedRequest) -> bool:
    return request.parameters.get("cache_salt") == "canary"


async def words(request: ReceivedRequest) -> AsyncIterator[Any]:
    """Three chunks and an end."""
    for word in ("one ", "two ", "three"):
        yield reply(word)
    yield reply("", "stop", num_tokens=0)


class FakeReplica(FakeTriton):
    """A fake server: canaries and tokenizing are answered, the rest is the script's."""

    def __init__(self, script: Script = words) -> None:
        self.behave = script
        super().__init__(self._answer, models={"llm", "tokenizer", "detokenizer"})

    @property
    def asked(self) -> list[ReceivedRequest]:
        """The requests that were no canaries."""
        return [request for request in self.requests if request.model == "llm" and not is_canary(request)]

    async def _answer(self, request: ReceivedRequest) -> AsyncIterator[Any]:
        if request.model == "tokenizer":
            yield tensor_response(
                input_ids=("INT32", [1, 2], [5, 6]),
                input_lengths=("INT32", [1, 1], [2]),
                max_model_len=("INT32", [1, 1], [64]),
            )
        elif request.model == "detokenizer":
            yield tensor_response(text_output=("BYTES", [1, 1], ["text"]))
        elif is_canary(request):
            yield reply("1", "length")
        else:
            async for item in self.behave(request):
                yield item


@asynccontextmanager
async def serving(*fakes: FakeTriton) -> AsyncIterator[None]:
    """All of them, on ports of their own."""
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(serve(fake))
        yield


def table_of(*fakes: FakeTriton, **more: Any) -> RoutingTable:
    """The fakes as replicas "a", "b", ... of the model "m"."""
    replicas = [{"name": "abcdefgh"[number], "url": fake.url, "model": "m"} for number, fake in enumerate(fakes)]
    return RoutingTable.model_validate({"replica": replicas, **more})


@asynccontextmanager
async def routed(table: RoutingTable, **settings: Any) -> AsyncIterator[RoutedUpstream]:
    """A started upstream, without pauses between checks, whose replicas are equals whenever each became ready."""
    given = {"health": QUICK, "balance": {"warm_up_s": 0}, **settings}
    upstream = RoutedUpstream(table, RoutingSettings.model_validate(given))
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.close()


def job(prompt: str = "p", *, model: str = "m", num_prompt_tokens: int = 10, **more: Any) -> Job:
    """A request of this prompt."""
    given = {key: more.pop(key) for key in ("timeout_s", "cache_salt") if key in more}
    return Job(
        model=model,
        generation=GenerationRequest(prompt=prompt, **given),
        num_prompt_tokens=num_prompt_tokens,
        max_output_tokens=more.pop("max_output_tokens", 20),
        affinity=prompt,
        **more,
    )


async def until(condition: Callable[[], bool]) -> None:
    """Waits until it is so; a test that waits in vain ends by its time-out."""
    while not condition():
        await asyncio.sleep(0.002)


async def all_healthy(upstream: RoutedUpstream) -> None:
    """Waits until every replica takes requests."""
    await until(lambda: all(replica.health == "healthy" for replica in upstream.router.replicas.replicas))


async def text_of(upstream: RoutedUpstream, job: Job) -> tuple[str, str]:
    """Runs a job; returns its text and who gave it."""
    text = ""
    async with upstream.open(job) as stream:
        async for chunk in stream:
            text += chunk.text
        return text, stream.replica
