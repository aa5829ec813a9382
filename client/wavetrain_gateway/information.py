# SPDX-License-Identifier: Apache-2.0
"""The routes beside generation: models, tokens, cancelling, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qsl

from wavetrain_client import ChatPrompt
from wavetrain_gateway.engine_load import as_json
from wavetrain_gateway.errors import InvalidRequest, NotFound, Unavailable
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.generation import check_model, take_body
from wavetrain_gateway.messages import template_messages
from wavetrain_gateway.schemas import DetokenizeRequest, TokenizeRequest
from wavetrain_gateway.services import Services
from wavetrain_gateway.upstream import ModelCard

_OWNER = "wavetrain"
_TEXT = "text/plain; charset=utf-8"


async def list_models(exchange: Exchange, services: Services) -> None:
    """GET /v1/models: those the caller's key may use."""
    cards = [card for card in services.upstream.models() if exchange.caller.may_use(card.id)]
    await exchange.answer_json({"object": "list", "data": [_model(card) for card in cards]})


async def get_model(exchange: Exchange, services: Services) -> None:
    """GET /v1/models/{id}."""
    name = str(exchange.scope["path_params"]["model"])
    for card in services.upstream.models():
        if card.id == name and exchange.caller.may_use(name):
            exchange.record.model = name
            await exchange.answer_json(_model(card))
            return
    raise NotFound(f"there is no model {name[:64]!r}; GET /v1/models lists them", code="model_not_found", param="model")


async def tokenize(exchange: Exchange, services: Services) -> None:
    """POST /tokenize."""
    body = await take_body(exchange, services, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    model = _model_of(body.model, exchange, services)
    timeout_s = exchange.timeout_s(services.settings.flow.total_timeout_s)
    if body.messages is not None:
        variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
        variables["add_generation_prompt"] = body.add_generation_prompt is not False
        chat = ChatPrompt(messages=template_messages(body.messages), variables=variables)
        found = await services.upstream.tokenize_chat(model, chat, timeout_s=timeout_s)
    else:
        is_raw = body.add_special_tokens is False
        found = await services.upstream.tokenize(model, body.prompt or "", is_raw=is_raw, timeout_s=timeout_s)
    token_ids = list(found.token_ids)
    await exchange.answer_json({"count": len(token_ids), "max_model_len": found.max_model_len, "tokens": token_ids})


async def tokenizer_info(exchange: Exchange, services: Services) -> None:
    """GET /tokenizer_info: what vLLM's says, for harnesses that tokenize by the server.

    It shows the chat template, which is no secret from whoever may use the model: /tokenize and /detokenize show what
    becomes of any messages.
    """
    query = dict(parse_qsl(str(exchange.scope["query_string"], "latin-1"), keep_blank_values=True))
    model = _model_of(query.pop("model", None), exchange, services)
    if query:
        raise InvalidRequest(f"there is no parameter {next(iter(query))[:64]!r}; there is 'model'", param="query")
    timeout_s = exchange.timeout_s(services.settings.flow.total_timeout_s)
    await exchange.answer_json(await services.upstream.tokenizer_info(model, timeout_s=timeout_s))


async def detokenize(exchange: Exchange, services: Services) -> None:
    """POST /detokenize."""
    body = await take_body(exchange, services, DetokenizeRequest)
    model = _model_of(body.model, exchange, services)
    timeout_s = exchange.timeout_s(services.settings.flow.total_timeout_s)
    text = await services.upstream.detokenize(model, body.tokens, timeout_s=timeout_s)
    await exchange.answer_json({"prompt": text})


async def cancel(exchange: Exchange, services: Services) -> None:
    """POST /v1/requests/{id}/cancel: ends a request of the caller's own."""
    request_id = str(exchange.scope["path_params"]["request_id"])
    services.lifecycle.cancel(request_id, exchange.caller.name)
    await exchange.answer_json({"id": request_id, "object": "request.cancelled", "cancelled": True})


async def live(exchange: Exchange, services: Services) -> None:
    """GET /livez: the process answers."""
    await exchange.answer(b"ok\n", _TEXT)


async def ready(exchange: Exchange, services: Services) -> None:
    """GET /readyz: requests are taken, and some replica would answer them."""
    if services.lifecycle.is_draining:
        raise Unavailable("this gateway is shutting down", code="draining")
    try:
        is_ready = await asyncio.wait_for(services.upstream.is_ready(), 5.0)
    except asyncio.TimeoutError:
        is_ready = False
    if not is_ready:
        raise Unavailable("no replica is ready", code="no_replica")
    await exchange.answer(b"ok\n", _TEXT)


async def metrics(exchange: Exchange, services: Services) -> None:
    """GET /metrics."""
    services.metrics.active.set(services.lifecycle.num_active)
    body, media = services.metrics.render()
    await exchange.answer(body, media)


async def load(exchange: Exchange, services: Services) -> None:
    """GET /load: what the engines are busy with."""
    await exchange.answer_json(as_json(await services.loads.read()))


def _model_of(name: str | None, exchange: Exchange, services: Services) -> str:
    """The model that a request about tokens names, or the only one that the caller may use.

    Raises:
        InvalidRequest: it names none, and there are several.
        NotFound, Forbidden: as `check_model`.
    """
    if name is None:
        cards = [card for card in services.upstream.models() if exchange.caller.may_use(card.id)]
        if len({card.root for card in cards}) != 1:
            raise InvalidRequest(
                "model is missing, and there are several; name one of GET /v1/models",
                param="model",
                code="missing_parameter",
            )
        name = cards[0].id
    return check_model(exchange, services, name).id


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created_s,
        "owned_by": _OWNER,
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_model_len,
    }
