# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document, made of the one table of routes, and GET /docs, the same for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.services import Services

if TYPE_CHECKING:
    from wavetrain_gateway.routes import RouteSpec

_EVERYWHERE = {
    400: "the request is wrong; error.param names the field",
    403: "the key, or the name the gateway was called by, is not allowed",
    500: "the gateway or the engine failed",
}
_WITH_KEY = {401: "no key, or none that is known", 429: "a limit is reached, or the engine is full; see retry-after"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code", "request_id"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "request_id": {"type": "string"},
            },
        }
    },
}
_CONTENT = {
    "/livez": "text/plain",
    "/readyz": "text/plain",
    "/metrics": "text/plain",
    "/docs": "text/html",
    "/": "text/html",
    "/page/{name}": "*/*",
}
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


async def docs_page(exchange: Exchange, services: Services) -> None:
    """GET /docs: one page that needs nothing from elsewhere."""
    page = resources.files("wavetrain_gateway").joinpath("docs.html").read_bytes()
    await exchange.answer(page, "text/html; charset=utf-8", headers={"content-security-policy": _PAGE_POLICY})


def openapi_document(routes: Sequence[RouteSpec]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes."""
    bodies = sorted({spec.body for spec in routes if spec.body is not None}, key=lambda body: body.__name__)
    _, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for spec in routes:
        path = re.sub(r":\w+}", "}", spec.path)
        paths.setdefault(path, {})[spec.method.lower()] = _operation(spec, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Wavetrain gateway",
            "version": "1",
            "description": "OpenAI's API in front of Wavetrain's models. The WebSocket /v1/stream is described in "
            "docs/gateway.md.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(spec: RouteSpec, path: str) -> dict[str, Any]:
    media = _CONTENT.get(spec.path, "application/json")
    content: dict[str, Any] = {media: {}}
    if spec.body is not None and spec.path.startswith("/v1/"):
        content["text/event-stream"] = {}
    answers: dict[int, str] = {**_EVERYWHERE, **({} if spec.is_public else _WITH_KEY), **spec.answers}
    responses: dict[str, Any] = {"200": {"description": "done", "content": content}}
    for status, text in sorted(answers.items()):
        responses[str(status)] = {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
    operation: dict[str, Any] = {
        "summary": spec.summary,
        "operationId": spec.handler.__name__,
        "responses": responses,
        "security": [] if spec.is_public else [{"key": []}],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in re.findall(r"{(\w+)}", path)
        ]
        + [{"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in spec.query],
    }
    if spec.body is not None:
        schema = {"$ref": f"#/components/schemas/{spec.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
