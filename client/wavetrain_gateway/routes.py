# SPDX-License-Identifier: Apache-2.0
"""The one table of routes: what is served, by whom, and what its OpenAPI entry says."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import BaseModel
from starlette.routing import Match, Route

from wavetrain_gateway import generation, information, web_page
from wavetrain_gateway.documentation import docs_page, openapi_document
from wavetrain_gateway.errors import MethodNotAllowed, NotFound
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from wavetrain_gateway.services import Services

Handler: TypeAlias = Callable[[Exchange, Services], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec:
    """One route.

    Attributes:
        is_public: answered without a key.
        is_work: refused while the gateway drains, and waited for.
        body: what it takes.
        query: parameters of its address, none of them required.
        answers: status to what it means, beside those that every route has.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    is_public: bool = False
    is_work: bool = False
    body: type[BaseModel] | None = None
    query: tuple[str, ...] = ()
    answers: dict[int, str] = field(default_factory=dict[int, str])


async def openapi(exchange: Exchange, services: Services) -> None:
    """GET /openapi.json."""
    await exchange.answer(_document(), "application/json")


@functools.cache
def _document() -> bytes:
    return json.dumps(openapi_document(ROUTES)).encode()


_GENERATION = {
    404: "there is no such model",
    408: "the body came too slowly",
    409: "a request of this x-request-id is running",
    413: "the body is too large",
    415: "the body is not sent as JSON",
    499: "the request was cancelled by its id",
    502: "the replica went away",
    503: "draining, no replica, or too long in the queue",
    504: "the request took too long",
}
_TOKENS = {status: text for status, text in _GENERATION.items() if status not in (409, 499)}

ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        method="POST",
        path="/v1/chat/completions",
        handler=generation.chat,
        summary="Answer a conversation",
        is_work=True,
        body=ChatRequest,
        answers=_GENERATION,
    ),
    RouteSpec(
        method="POST",
        path="/v1/completions",
        handler=generation.complete,
        summary="Continue prompts",
        is_work=True,
        body=CompletionRequest,
        answers=_GENERATION,
    ),
    RouteSpec(method="GET", path="/v1/models", handler=information.list_models, summary="List the models"),
    RouteSpec(
        method="GET",
        path="/v1/models/{model:path}",
        handler=information.get_model,
        summary="Tell about a model",
        answers={404: "there is no such model"},
    ),
    RouteSpec(
        method="POST",
        path="/v1/requests/{request_id}/cancel",
        handler=information.cancel,
        summary="Cancel a running request",
        answers={404: "no such request is running"},
    ),
    RouteSpec(
        method="POST",
        path="/tokenize",
        handler=information.tokenize,
        summary="Text or messages to token ids",
        is_work=True,
        body=TokenizeRequest,
        answers=_TOKENS,
    ),
    RouteSpec(
        method="GET",
        path="/tokenizer_info",
        handler=information.tokenizer_info,
        summary="Tell what the tokenizer is",
        is_work=True,
        query=("model",),
        answers={status: _TOKENS[status] for status in (404, 502, 503, 504)},
    ),
    RouteSpec(
        method="POST",
        path="/detokenize",
        handler=information.detokenize,
        summary="Token ids to text",
        is_work=True,
        body=DetokenizeRequest,
        answers=_TOKENS,
    ),
    RouteSpec(method="GET", path="/livez", handler=information.live, summary="The process answers", is_public=True),
    RouteSpec(
        method="GET",
        path="/readyz",
        handler=information.ready,
        summary="Requests are taken",
        answers={503: "draining, or no replica is ready"},
    ),
    RouteSpec(method="GET", path="/load", handler=information.load, summary="Tell what the engines are busy with"),
    RouteSpec(method="GET", path="/metrics", handler=information.metrics, summary="Prometheus metrics"),
    RouteSpec(method="GET", path="/openapi.json", handler=openapi, summary="This document"),
    RouteSpec(method="GET", path="/docs", handler=docs_page, summary="This document, for people"),
    RouteSpec(method="GET", path="/", handler=web_page.index, summary="A page to try it on", is_public=True),
    RouteSpec(
        method="GET",
        path="/page/{name}",
        handler=web_page.part,
        summary="A part of that page",
        is_public=True,
        answers={404: "there is no such part"},
    ),
)


class RouteTable:
    """Finds routes by path and method."""

    def __init__(self, specs: Sequence[RouteSpec]) -> None:
        # Starlette's routes are used for matching alone; the handlers are called here.
        self._routes = [(Route(spec.path, _never_called, methods=[spec.method]), spec) for spec in specs]

    def find(self, scope: Any) -> RouteSpec:
        """Returns the route of a request, and puts its path's parameters into the scope.

        Raises:
            NotFound: there is no such path.
            MethodNotAllowed: it takes other methods.
        """
        allowed: set[str] = set()
        for route, spec in self._routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope["path_params"] = found["path_params"]
                return spec
            if match is Match.PARTIAL:
                allowed |= route.methods or set()
        if allowed:
            methods = ", ".join(sorted(allowed))
            raise MethodNotAllowed(f"this route takes {methods}", headers={"allow": methods})
        raise NotFound("there is no such route; GET /openapi.json lists them", code="unknown_route")


async def _never_called(_: Any) -> None:
    raise AssertionError("routes are matched here and called by the gateway")
