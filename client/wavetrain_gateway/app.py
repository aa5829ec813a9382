# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: what every request goes through before and after its handler.

Written to ASGI itself rather than on a framework's middleware, because those hide a client's disconnect from what
they wrap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from wavetrain_gateway.bodies import ClientGone
from wavetrain_gateway.errors import GatewayError
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.generation import as_gateway_error
from wavetrain_gateway.host_names import check_host
from wavetrain_gateway.routes import ROUTES, RouteSpec, RouteTable
from wavetrain_gateway.services import Services
from wavetrain_gateway.stream_socket import StreamSockets

SOCKET_PATH = "/v1/stream"
_CLIENT_CLOSED = 499


class GatewayApp:
    """Answers HTTP requests and WebSockets. `routes` are the HTTP ones."""

    def __init__(self, services: Services, routes: Sequence[RouteSpec] = ROUTES) -> None:
        self.services = services
        self.routes = routes
        self._table = RouteTable(routes)
        self._sockets = StreamSockets(services)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI 3."""
        if scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send))
        elif scope["type"] == "websocket":
            await self._serve_socket(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._handle(exchange)
        except ClientGone:
            exchange.record.status, exchange.record.error_code = _CLIENT_CLOSED, "client_closed"
        except asyncio.CancelledError:
            exchange.record.error_code = exchange.record.error_code or "server_shutdown"
            raise
        except Exception as error:
            failure = as_gateway_error(error, self.services, exchange.request_id)
            if failure.status >= 500:
                self.services.log.upstream_failure(failure, exchange.request_id)
            await exchange.answer_error(failure)
        finally:
            self.services.note_end(exchange)

    async def _serve_socket(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == SOCKET_PATH:
            await self._sockets.serve(scope, receive, send)
        else:
            # Before the handshake this refuses it.
            await send({"type": "websocket.close", "code": 1008})

    async def _handle(self, exchange: Exchange) -> None:
        exchange.take_request_id()
        check_host(exchange.headers.get("host", ""), self.services.allowed_hosts)
        try:
            spec = self._table.find(exchange.scope)
        except GatewayError:
            # What is not there is told only to those who may know what is.
            exchange.caller = self._caller(exchange)
            raise
        exchange.record.route = spec.path
        if not spec.is_public:
            exchange.caller = self._caller(exchange)
        with ExitStack() as stack:
            if spec.is_work:
                stack.enter_context(self.services.lifecycle.active())
            await spec.handler(exchange, self.services)

    def _caller(self, exchange: Exchange) -> Any:
        return self.services.admission.authenticate(exchange.headers, exchange.client_host)

    async def _live(self, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            kind = message["type"]
            try:
                await (self._start() if kind == "lifespan.startup" else self._stop())
            except Exception as error:
                await send({"type": f"{kind}.failed", "message": str(error)})
            else:
                await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _start(self) -> None:
        await self.services.admission.start()
        await self.services.upstream.start()

    async def _stop(self) -> None:
        await self._sockets.close()
        await self.services.upstream.close()
        await self.services.admission.close()
        await self.services.cache.close()
        # Sending what is left of the traces may take a while, and nobody is answered any more.
        await asyncio.to_thread(self.services.tracer.close)


def with_cors(app: GatewayApp) -> Any:
    """The application, callable from pages of the configured origins."""
    origins = app.services.settings.listen.allowed_origins
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id", "x-request-timeout-ms"],
        expose_headers=["x-request-id", "openai-processing-ms", "retry-after"],
    )
