# SPDX-License-Identifier: Apache-2.0
"""The WebSocket at /v1/stream: many requests on one connection, resumable on another. docs/gateway.md has the frames.

The peer's frames are read by one task, its events are written by another; each request runs in a task of its own, so
that none waits for another and all outlive a connection that breaks.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from wavetrain_gateway.bodies import parse_object
from wavetrain_gateway.errors import (
    Conflict,
    Forbidden,
    GatewayError,
    InvalidRequest,
    NotFound,
    RateLimited,
    Unavailable,
)
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.host_names import check_host
from wavetrain_gateway.plan import Plan, plan_chat, plan_completion
from wavetrain_gateway.schemas import ChatRequest, CompletionRequest
from wavetrain_gateway.services import Services
from wavetrain_gateway.socket_request import SocketRequest, parse_frame

SUBPROTOCOL = "wavetrain"
_KEY_SUBPROTOCOL = "wavetrain-key."
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_BATCH_CHARS = 64 << 10
_TOO_SLOW = 1013
_GOING_AWAY = 1001


class StreamSockets:
    """All WebSockets of the gateway, and the requests they may come back to."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._requests: dict[tuple[str, str], SocketRequest] = {}

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one connection until it ends."""
        socket = WebSocket(scope, receive, send)
        headers = _headers_of(socket)
        exchange = Exchange(scope, receive, send)
        try:
            check_host(headers.get("host", ""), self._services.allowed_hosts)
            self._check_origin(headers)
            caller = self._services.admission.authenticate(headers, exchange.client_host)
            if self._services.lifecycle.is_draining:
                raise Unavailable("this gateway is shutting down", code="draining")
        except GatewayError as error:
            body = error.body(exchange.request_id)
            await socket.send_denial_response(JSONResponse(body, status_code=error.status, headers=error.headers))
            return
        offered = [item.strip() for item in headers.get("sec-websocket-protocol", "").split(",")]
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        self._services.metrics.sockets.inc()
        connection = _Connection(socket, self, self._services, headers, caller.name)
        try:
            await connection.serve()
        finally:
            self._services.metrics.sockets.dec()

    async def close(self) -> None:
        """Ends all requests."""
        for request in list(self._requests.values()):
            await request.close()
        self._requests.clear()

    def start(self, name: str, plan: Plan, exchange: Exchange) -> SocketRequest:
        """Runs a new request.

        Raises:
            Conflict: the caller has one of this name.
        """
        key = (exchange.caller.name, name)
        if key in self._requests:
            raise Conflict("this id belongs to another request; give each its own", param="id")
        request = SocketRequest(name, plan, exchange, self._services, self._forget)
        self._requests[key] = request
        return request

    def find(self, owner: str, name: str) -> SocketRequest:
        """Returns a request of the caller's.

        Raises:
            NotFound: there is none, or it ended too long ago.
        """
        request = self._requests.get((owner, name))
        if request is None:
            raise NotFound("there is no such request, or it ended too long ago", code="request_not_found", param="id")
        return request

    def _forget(self, request: SocketRequest) -> None:
        self._requests.pop((request.owner, request.name), None)

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Pages of other sites must not use a gateway that their reader's browser can reach."""
        origin = headers.get("origin")
        if origin is None or origin in self._services.settings.listen.allowed_origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise Forbidden("pages of this origin may not open a WebSocket here", code="origin_not_allowed")


class _Connection:
    """One connection: reads frames, writes events."""

    def __init__(
        self, socket: WebSocket, sockets: StreamSockets, services: Services, headers: Mapping[str, str], owner: str
    ) -> None:
        self._socket = socket
        self._sockets = sockets
        self._services = services
        self._headers = headers
        self._owner = owner
        self._readings: dict[str, tuple[SocketRequest, int]] = {}
        self._replies: list[str] = []
        self._wake = asyncio.Event()
        self._is_over = False

    async def serve(self) -> None:
        """Serves until the peer leaves, takes nothing for too long, or the gateway ends."""
        writer = asyncio.ensure_future(self._write())
        reader = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait([writer, reader], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_over = True
            for task in (writer, reader):
                task.cancel()
            await asyncio.wait([writer, reader])
            for request, _ in self._readings.values():
                request.detach(self._notify)

    def _notify(self) -> None:
        self._wake.set()

    async def _read(self) -> None:
        while True:
            try:
                text = await self._socket.receive_text()
            except (WebSocketDisconnect, KeyError, RuntimeError):  # KeyError: a binary frame
                return
            name = ""
            try:
                async with self._services.large_bodies.turn(len(text)):
                    frame = parse_frame(text)
                    if frame is None:
                        raise InvalidRequest("a frame must be the text of a JSON object", code="invalid_json")
                    name = str(frame.get("id", ""))[:128]
                    self._take(frame)
            except GatewayError as error:
                body = error.body("")["error"]
                self._replies.append(json.dumps({"type": "error", "id": name, "event": None, "error": body}))
                self._notify()

    def _take(self, frame: dict[str, Any]) -> None:
        kind, name = frame.get("type"), frame.get("id")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise InvalidRequest("id must be 1 to 128 letters, digits and ._:-", param="id")
        if kind == "request":
            self._start(name, frame)
        elif kind == "cancel":
            self._sockets.find(self._owner, name).cancel()
        elif kind == "resume":
            after = frame.get("after", 0)
            if not isinstance(after, int) or isinstance(after, bool):
                raise InvalidRequest("after must be the number of the last event you have", param="after")
            request = self._sockets.find(self._owner, name)
            self._readings[name] = (request, request.attach(after, self._notify))
            self._notify()
        else:
            raise InvalidRequest("type must be 'request', 'cancel' or 'resume'", param="type")

    def _start(self, name: str, frame: dict[str, Any]) -> None:
        running = sum(not request.is_over for request, _ in self._readings.values())
        most = self._services.settings.flow.max_socket_requests
        if running >= most:
            raise RateLimited(
                f"this connection has {running} running requests; at most {most}", code="too_many_requests"
            )
        exchange = Exchange(self._socket.scope, None, None)
        exchange.record.route = "/v1/stream"
        # Again, as the key may have been taken back since the connection was made.
        exchange.caller = self._services.admission.authenticate(self._headers, exchange.client_host)
        plan = self._plan(frame)
        request = self._sockets.start(name, plan, exchange)
        self._readings[name] = (request, request.attach(0, self._notify))

    def _plan(self, frame: dict[str, Any]) -> Plan:
        body, caps = frame.get("body"), self._services.settings.caps
        if not isinstance(body, dict):
            raise InvalidRequest("body must be what POST takes, a JSON object", param="body")
        fields: dict[str, Any] = {**body, "stream": True}
        if frame.get("api") == "completions":
            return plan_completion(parse_object(fields, CompletionRequest, caps.max_sizes), caps)
        if frame.get("api") == "chat":
            return plan_chat(parse_object(fields, ChatRequest, caps.max_sizes), caps)
        raise InvalidRequest("api must be 'chat' or 'completions'", param="api")

    async def _write(self) -> None:
        timeout_s = self._services.settings.flow.write_timeout_s
        while True:
            self._wake.clear()
            frames = self._due()
            if not frames:
                if self._services.lifecycle.is_draining and not self._readings:
                    await self._socket.close(_GOING_AWAY)
                    return
                await self._wake.wait()
                continue
            try:
                for frame in frames:
                    await asyncio.wait_for(self._socket.send_text(frame), timeout_s)
            except asyncio.TimeoutError:
                for request, _ in self._readings.values():
                    request.cancel()
                return
            except (WebSocketDisconnect, RuntimeError):
                return

    def _due(self) -> list[str]:
        """The frames to send next, of each request some."""
        frames, self._replies = self._replies, []
        for name, (request, number) in list(self._readings.items()):
            num_chars = 0
            while num_chars < _MAX_BATCH_CHARS and (frame := request.read(number)) is not None:
                frames.append(frame)
                num_chars += len(frame)
                number += 1
            is_behind = request.read(number) is not None
            request.has_been_read(is_behind=is_behind)
            if request.is_over and not is_behind:
                del self._readings[name]
                request.detach(self._notify)
            else:
                self._readings[name] = (request, number)
        return frames


def _headers_of(socket: WebSocket) -> dict[str, str]:
    """The handshake's headers; a key that came as a subprotocol, as browsers can send no header, is one of them."""
    headers = {name.lower(): value for name, value in socket.headers.items()}
    for item in headers.get("sec-websocket-protocol", "").split(","):
        offered = item.strip()
        if offered.startswith(_KEY_SUBPROTOCOL) and "authorization" not in headers:
            headers["authorization"] = f"Bearer {offered.removeprefix(_KEY_SUBPROTOCOL)}"
    return headers
