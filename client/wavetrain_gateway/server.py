# SPDX-License-Identifier: Apache-2.0
"""Runs the gateway: sockets, signals, and an end that lets running requests finish.

serving ──SIGTERM or SIGINT──▶ draining: /readyz and new work 503, running requests go on
        ──idle, or drain_timeout_s over, or a second signal──▶ what still runs ends with an error ──▶ stopped
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from wavetrain_gateway.app import GatewayApp, with_cors
from wavetrain_gateway.http_protocol import BoundedSocketProtocol, bounded_protocol

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_WORDS_S = 2.0


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would close the listener before anybody is told."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class GatewayServer:
    """Serves an application on sockets until a signal, or until `stop`."""

    def __init__(self, app: GatewayApp, *, on_ready: Callable[[], None] | None = None) -> None:
        settings = app.services.settings
        self._app = app
        self._on_ready = on_ready
        self._drain_timeout_s = settings.listen.drain_timeout_s
        self._ending: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                with_cors(app),
                http=bounded_protocol(settings.caps, settings.listen),
                ws=BoundedSocketProtocol,
                # Deflating events of a few bytes costs more than it saves, and each connection a window of memory.
                ws_per_message_deflate=False,
                ws_max_size=settings.caps.max_body_bytes,
                ws_ping_interval=20.0,
                ws_ping_timeout=20.0,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=round(settings.listen.keep_alive_s),
                timeout_graceful_shutdown=round(_LAST_WORDS_S),
                backlog=2048,
            )
        )

    async def serve(self, sockets: list[socket.socket], *, admin: tuple[Any, socket.socket] | None = None) -> None:
        """Serves until the end; the sockets are closed then.

        Args:
            admin: another application, and the socket it is served on as long.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            # Not possible outside the main thread, as in a test: whoever runs it there calls `stop`.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self.stop)
        _calm_garbage_collector()
        announcing = loop.create_task(self._announce())
        beside = None if admin is None else _Server(uvicorn.Config(admin[0], log_config=None, access_log=False))
        serving_beside = None if beside is None or admin is None else loop.create_task(beside.serve([admin[1]]))
        try:
            await self._server.serve(sockets)
        finally:
            announcing.cancel()
            if beside is not None and serving_beside is not None:
                beside.should_exit = True
                await serving_beside
            for number in _SIGNALS:
                with contextlib.suppress(ValueError, RuntimeError):
                    loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begins to drain; called again, it hurries."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        else:
            self._hurry.set()

    @property
    def has_started(self) -> bool:
        """Whether connections are taken."""
        return self._server.started

    async def _announce(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        if self._on_ready is not None:
            self._on_ready()

    async def _end(self) -> None:
        lifecycle = self._app.services.lifecycle
        lifecycle.drain()
        waits = {
            asyncio.ensure_future(lifecycle.wait_idle(self._drain_timeout_s)),
            asyncio.ensure_future(self._hurry.wait()),
        }
        _, unfinished = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in unfinished:
            wait.cancel()
        lifecycle.end_all()
        await lifecycle.wait_idle(_LAST_WORDS_S)
        self._server.should_exit = True


def _calm_garbage_collector() -> None:
    """What is there now stays. Looking for garbage after every 700 objects, as is the default, would take longer than
    parsing a large body itself; nothing here leaves much behind that reference counts do not find.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def listen_on(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the address is in use, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio sends small events at once (TCP_NODELAY) on sockets that say they are TCP's.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
