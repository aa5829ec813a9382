# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions and /v1/chat/completions: from a plan to its answer, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from wavetrain_client import ClientError
from wavetrain_gateway.admission import Ticket
from wavetrain_gateway.answers import DONE, Answer, as_events, error_event
from wavetrain_gateway.bodies import ClientGone, SchemaT, parse_body, read_body
from wavetrain_gateway.errors import (
    Forbidden,
    GatewayError,
    InternalError,
    InvalidRequest,
    NotFound,
    RequestCancelled,
    from_client_error,
)
from wavetrain_gateway.event_stream import EventStream, ReaderTooSlow
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.feed import Feed
from wavetrain_gateway.plan import Plan, plan_chat, plan_completion
from wavetrain_gateway.response_cache import CachedAnswer, cached_pieces
from wavetrain_gateway.schemas import ChatRequest, CompletionRequest
from wavetrain_gateway.services import Services
from wavetrain_gateway.upstream import ModelCard

CACHE_HEADER = "x-wavetrain-cache"


async def complete(exchange: Exchange, services: Services) -> None:
    """POST /v1/completions."""
    body = await take_body(exchange, services, CompletionRequest)
    await _answer(exchange, services, plan_completion(body, services.settings.caps))


async def chat(exchange: Exchange, services: Services) -> None:
    """POST /v1/chat/completions."""
    body = await take_body(exchange, services, ChatRequest)
    await _answer(exchange, services, plan_chat(body, services.settings.caps))


async def take_body(exchange: Exchange, services: Services, schema: type[SchemaT]) -> SchemaT:
    """The request's body. Raises what `read_body` and `parse_body` raise."""
    caps = services.settings.caps
    data = await read_body(
        exchange.receive,
        exchange.headers,
        max_bytes=caps.max_body_bytes,
        timeout_s=services.settings.flow.body_timeout_s,
    )
    async with services.large_bodies.turn(len(data)):
        return parse_body(data, schema, caps.max_sizes)


def check_model(exchange: Exchange, services: Services, model: str) -> ModelCard:
    """Notes the model of a request, and returns what is known of it.

    Raises:
        NotFound: there is none of this name.
        Forbidden: the caller's key may not use it.
    """
    card = next((card for card in services.upstream.models() if card.id == model), None)
    if card is None:
        raise NotFound(
            f"there is no model {model[:64]!r}; GET /v1/models lists them", code="model_not_found", param="model"
        )
    if not exchange.caller.may_use(model):
        raise Forbidden(f"your key may not use the model {model!r}", code="model_not_allowed", param="model")
    exchange.record.model = model
    return card


def check_plan(exchange: Exchange, services: Services, plan: Plan) -> None:
    """Notes the model of a plan, and refuses prompts that are surely too long before anybody works on them.

    Raises:
        NotFound, Forbidden: as `check_model`.
        InvalidRequest: a prompt of token ids has more of them than the model takes.
    """
    card = check_model(exchange, services, plan.model)
    longest = max((len(prompt) for prompt in plan.prompts if isinstance(prompt, list)), default=0)
    if card.max_model_len is not None and longest >= card.max_model_len:
        raise InvalidRequest(
            f"the prompt has {longest} tokens, but the model takes {card.max_model_len} of prompt and output together",
            code="context_length_exceeded",
            param="prompt",
        )


async def until_gone(exchange: Exchange, work: Awaitable[None], feed: Feed) -> None:
    """Does the work while watching for the peer to close the connection, which ends the feed at once."""
    watcher = asyncio.ensure_future(_watch(exchange, feed))
    try:
        await work
    finally:
        watcher.cancel()


def as_gateway_error(error: BaseException, services: Services, request_id: str) -> GatewayError:
    """What a caller is told of any failure; what nobody foresaw goes to the log with its stack."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, ClientError):
        return from_client_error(error)
    services.log.failure(error, request_id)
    return InternalError("the gateway failed on this request; its log says why")


async def _answer(exchange: Exchange, services: Services, plan: Plan) -> None:
    check_plan(exchange, services, plan)
    exchange.record.is_streamed = plan.is_streamed
    timeout_s = exchange.timeout_s(services.settings.flow.total_timeout_s)
    async with admitted(exchange, services, plan) as ticket:
        exchange.extra_headers.update(ticket.headers)
        if services.cache.may_keep(plan):
            cached = await services.cache.find(plan, exchange.caller)
            if cached is not None:
                await _answer_from_cache(exchange, services, plan, cached)
                return
            exchange.extra_headers[CACHE_HEADER] = "miss"
        await _generate(exchange, services, plan, timeout_s)


async def _generate(exchange: Exchange, services: Services, plan: Plan, timeout_s: float) -> None:
    echoed = await prompt_texts(plan, services, timeout_s)
    is_kept = services.cache.may_keep(plan)
    answer = Answer(plan, answer_id(plan, exchange.request_id), int(time.time()), echoed, is_kept=is_kept)
    async with open_feed(plan, exchange, services, timeout_s) as feed:
        with services.lifecycle.running(exchange.request_id, exchange.caller.name, feed):
            show = _stream if plan.is_streamed else _whole
            await until_gone(exchange, show(exchange, services, plan, feed, answer), feed)


def answer_id(plan: Plan, request_id: str) -> str:
    """The answer's id: the request's, with OpenAI's prefix."""
    return f"{'chatcmpl' if plan.is_chat else 'cmpl'}-{request_id}"


@asynccontextmanager
async def admitted(exchange: Exchange, services: Services, plan: Plan) -> AsyncGenerator[Ticket, None]:
    """Lets a plan in, and settles what it really used, whatever becomes of it.

    Raises:
        RateLimited: the caller's limits are full.
    """
    ticket = await services.admission.admit(exchange.caller, plan.demand())
    try:
        yield ticket
    finally:
        stats = exchange.record.stats
        used = 0 if stats is None else stats.num_prompt_tokens + stats.num_output_tokens
        # A caller that goes away must not keep its stream's slot.
        await asyncio.shield(ticket.settle(used))


@asynccontextmanager
async def open_feed(plan: Plan, exchange: Exchange, services: Services, timeout_s: float) -> AsyncGenerator[Feed, None]:
    """Runs a plan's jobs while the block lasts."""
    flow = services.settings.flow
    feed = Feed(
        services.upstream,
        plan.jobs(exchange.caller, timeout_s, services.tracer.traceparent(exchange)),
        queue_timeout_s=flow.queue_timeout_s,
        total_timeout_s=timeout_s,
        max_running=services.settings.caps.max_running_prompts,
        max_buffered_chars=flow.max_buffered_chars,
    )
    exchange.record.stats = feed.stats
    async with feed:
        yield feed


async def prompt_texts(plan: Plan, services: Services, timeout_s: float) -> Sequence[str]:
    """What `echo` puts before the outputs."""
    if not plan.is_echoed:
        return ()
    texts: list[str] = []
    for prompt in plan.prompts:
        if isinstance(prompt, str):
            texts.append(prompt)
        elif isinstance(prompt, Sequence):
            texts.append(await services.upstream.detokenize(plan.model, prompt, timeout_s=timeout_s))
    return texts


async def _whole(exchange: Exchange, services: Services, plan: Plan, feed: Feed, answer: Answer) -> None:
    while news := await feed.take():
        for item in news:
            answer.add(item)
    exchange.record.finish_reasons = answer.finish_reasons()
    body = answer.whole(feed.stats)
    await services.cache.keep(plan, exchange.caller, body)
    await exchange.answer_json(body)


async def _stream(exchange: Exchange, services: Services, plan: Plan, feed: Feed, answer: Answer) -> None:
    flow = services.settings.flow
    # The status is sent with the first token: until then a failure has a status of its own.
    news = await feed.take()
    try:
        async with EventStream(
            exchange, write_timeout_s=flow.write_timeout_s, ping_interval_s=flow.ping_interval_s
        ) as stream:
            await stream.start({})
            await _write_events(exchange, services, plan, feed, answer, stream, news)
    except ReaderTooSlow:
        exchange.record.error_code = "reader_too_slow"


async def _write_events(
    exchange: Exchange,
    services: Services,
    plan: Plan,
    feed: Feed,
    answer: Answer,
    stream: EventStream,
    news: Sequence[Any],
) -> None:
    try:
        while news:
            pieces = [piece for item in news for piece in answer.pieces(item, feed.stats)]
            if pieces:
                await stream.write(as_events(pieces))
            news = await feed.take()
    except ClientGone:
        raise
    except Exception as error:
        failure = as_gateway_error(error, services, exchange.request_id)
        exchange.record.error_code = failure.code or failure.type
        if not isinstance(failure, RequestCancelled):
            services.log.upstream_failure(failure, exchange.request_id)
        await stream.write(error_event(failure, exchange.request_id), is_last=True)
        return
    exchange.record.finish_reasons = answer.finish_reasons()
    last = [answer.usage_piece(feed.stats)] if plan.has_usage else []
    await stream.write(as_events(last) + DONE, is_last=True)
    if services.cache.may_keep(plan):
        await services.cache.keep(plan, exchange.caller, answer.whole(feed.stats))


async def _watch(exchange: Exchange, feed: Feed) -> None:
    while True:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            feed.fail(ClientGone())
            return


async def _answer_from_cache(exchange: Exchange, services: Services, plan: Plan, cached: CachedAnswer) -> None:
    """A repeat of an earlier answer, under this request's id."""
    exchange.record.is_from_cache = True
    exchange.extra_headers[CACHE_HEADER] = "hit"
    body = {**cached.body, "id": answer_id(plan, exchange.request_id)}
    exchange.record.finish_reasons = [str(choice["finish_reason"]) for choice in cached.body["choices"]]
    if not plan.is_streamed:
        await exchange.answer_json(body)
        return
    flow = services.settings.flow
    async with EventStream(
        exchange, write_timeout_s=flow.write_timeout_s, ping_interval_s=flow.ping_interval_s
    ) as stream:
        await stream.start({})
        await stream.write(as_events(cached_pieces(plan, body)) + DONE, is_last=True)
