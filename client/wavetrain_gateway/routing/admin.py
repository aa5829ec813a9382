# SPDX-License-Identifier: Apache-2.0
"""The admin API: which replicas there are, and adding, draining and removing them without a restart.

    GET    /replicas                 all, with what they have to do
    POST   /replicas                 adds one: {"url": ..., "model": ..., "name"?, "triton_model"?, "weight"?}
    POST   /replicas/{name}/drain    gives it no new requests
    POST   /replicas/{name}/resume   gives it requests again
    DELETE /replicas/{name}          removes it when its requests are finished

An application of its own, for a listener of its own on loopback: whoever may ask models may not move them. Each
request needs `Authorization: Bearer KEY` with the admin's key. Names may hold slashes; they are percent-encoded then.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wavetrain_gateway.errors import (
    Conflict,
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    TooLarge,
    Unauthenticated,
)
from wavetrain_gateway.keys import hash_key, key_in
from wavetrain_gateway.routing.replica import Replica
from wavetrain_gateway.routing.replica_set import ReplicaSet
from wavetrain_gateway.routing.routing_table import ReplicaEntry
from wavetrain_gateway.toml_file import describe

_MAX_BODY_BYTES = 64 << 10

Handler = Callable[[Request], Awaitable[Response]]


def show_replica(replica: Replica, replicas: ReplicaSet, *, is_retiring: bool = False) -> dict[str, Any]:
    """A replica, as the admin API shows it."""
    entry = replica.entry
    state = replica.health
    if is_retiring:
        state = "removing"
    elif replica.is_draining:
        state = "draining"
    elif state == "healthy" and replicas.is_ejected(replica):
        state = "ejected"
    return {
        "name": replica.name,
        "url": entry.url,
        "model": entry.model,
        "triton_model": entry.triton_model,
        "weight": entry.weight,
        "origin": replica.origin,
        "state": state,
        "circuit": replica.breaker.state,
        "num_running": replica.num_running,
        "outstanding_tokens": replica.outstanding_tokens,
        "num_requests": replica.counts.requests,
        "num_failures": replica.counts.failures,
        "num_affine": replica.counts.affine,
        "num_ejections": replicas.num_ejections(replica),
    }


class AdminApi:
    """The handlers.

    Args:
        replicas: what is moved.
        key: the admin's key.

    Raises:
        ValueError: no key.
    """

    def __init__(self, replicas: ReplicaSet, key: str) -> None:
        if not key:
            raise ValueError("the admin API needs a key of its own; `wavetrain keys create admin` makes one")
        self._replicas = replicas
        self._digest = hash_key(key)

    def app(self) -> Starlette:
        """The application, for a listener on loopback."""
        handlers: list[tuple[str, str, Handler]] = [
            ("/replicas", "GET", self._list),
            ("/replicas", "POST", self._add),
            ("/replicas/{name:path}/drain", "POST", self._drain),
            ("/replicas/{name:path}/resume", "POST", self._resume),
            ("/replicas/{name:path}", "DELETE", self._remove),
        ]
        routes = [Route(path, self._guarded(handler), methods=[method]) for path, method, handler in handlers]
        answers = {404: self._guarded(_no_route), 405: self._guarded(_no_method), GatewayError: _answer, 500: _internal}
        return Starlette(routes=routes, exception_handlers=cast("Any", answers))

    def _guarded(self, handler: Handler) -> Callable[..., Awaitable[Response]]:
        async def guarded(request: Request, _: Exception | None = None) -> Response:
            key = key_in(dict(request.headers))
            digest = hash_key(key) if key is not None else hashlib.sha256(b"").hexdigest()
            if not hmac.compare_digest(digest, self._digest):
                return await _answer(request, Unauthenticated("the admin's key is needed: 'Authorization: Bearer KEY'"))
            try:
                return await handler(request)
            except GatewayError as error:
                return await _answer(request, error)

        return guarded

    async def _list(self, request: Request) -> Response:
        shown = [show_replica(replica, self._replicas) for replica in self._replicas.replicas]
        shown += [show_replica(replica, self._replicas, is_retiring=True) for replica in self._replicas.retiring]
        return JSONResponse({"replicas": shown})

    async def _add(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY_BYTES:
                raise TooLarge(f"the body is larger than {_MAX_BODY_BYTES} bytes")
        try:
            entry = ReplicaEntry.model_validate(json.loads(body))
        except ValidationError as error:
            raise InvalidRequest(describe(error, ReplicaEntry)) from None
        except (ValueError, RecursionError):
            raise InvalidRequest('the body must be JSON: {"url": "host:8001", "model": "..."}') from None
        try:
            replica = self._replicas.add(entry, "admin")
        except ValueError as error:
            raise Conflict(str(error), code="replica_exists") from None
        return JSONResponse(show_replica(replica, self._replicas), status_code=201)

    async def _drain(self, request: Request) -> Response:
        replica = self._find(request)
        replica.is_draining = True
        return JSONResponse(show_replica(replica, self._replicas))

    async def _resume(self, request: Request) -> Response:
        replica = self._find(request)
        replica.is_draining = False
        return JSONResponse(show_replica(replica, self._replicas))

    async def _remove(self, request: Request) -> Response:
        replica = self._replicas.retire(self._find(request).name)
        return JSONResponse(show_replica(replica, self._replicas, is_retiring=True), status_code=202)

    def _find(self, request: Request) -> Replica:
        name = str(request.path_params["name"])
        replica = self._replicas.find(name)
        if replica is None:
            raise NotFound(f"there is no replica {name[:128]!r}; GET /replicas lists them", code="replica_not_found")
        return replica


async def _no_route(request: Request) -> Response:
    raise NotFound("there is no such route; the admin API has /replicas")


async def _no_method(request: Request) -> Response:
    raise MethodNotAllowed("the route takes another method")


async def _answer(request: Request, error: GatewayError) -> Response:
    return JSONResponse(error.body(""), status_code=error.status, headers=error.headers)


async def _internal(request: Request, error: Exception) -> Response:
    return await _answer(request, InternalError("the admin API failed on this request; the log says why"))
