# SPDX-License-Identifier: Apache-2.0
"""The core's end of the socket: the engine loop's inbox, and where its updates go out.

Everything happens on the one thread that also runs the engine, inside `drain`, `emit` and `report_progress`:
no lock, no queue between threads, no extra latency. Invariants:
    1. an update goes to the client that added its request, and to nobody once that client has left; in order, and
       with no more messages than steps
    2. a client that died or said Goodbye has all its requests cancelled
    3. the core ends when its server dies, when its last client leaves, or on SIGTERM
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import msgspec

from wavetrain_engine.command import Add, Cancel, Command, Shutdown
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.ipc.connection import Connection
from wavetrain_engine.ipc.frames import (
    PROTOCOL_VERSION,
    ClientFrame,
    CoreFrame,
    Drain,
    GetStats,
    Goodbye,
    Hello,
    Hold,
    LoadFailed,
    Progress,
    Ready,
    Stats,
    Updates,
    decode_client_frame,
    encode,
)
from wavetrain_engine.ipc.held_updates import HeldUpdates
from wavetrain_engine.ipc.process_watch import ProcessWatch
from wavetrain_engine.request import FinishReason, RequestUpdate
from wavetrain_engine.stats import EngineStats

_LOGGER = logging.getLogger(__name__)
# The first client has started us and connects at once; if it never does, it died on the way.
_FIRST_CLIENT_TIMEOUT_S = 60.0
# A load can fail before the model that started us has connected; it should not take that for a crash.
_LAST_WORDS_TIMEOUT_S = 5.0
# What a model has not read by then when the core ends is lost to it; it ends its requests itself.
_LINGER_S = 1.0
# A server without a pidfd is looked at this often.
_POLL_INTERVAL_S = 0.2
# Where the engine computes on the cores that also send, a first token waits beside the next step at each of the seven
# threads it passes on its way out, 1.5 ms undisturbed. A lone request's next step waits instead; nobody else pays.
_FIRST_TOKEN_PAUSE_S = 0.003


class CoreSocket:
    """Binds the core's socket and speaks the protocol of `frames` on it."""

    def __init__(self, path: Path, server_pid: int) -> None:
        """Listens at `path` and watches the Triton server's process.

        Raises:
            OSError: the path cannot be bound.
        """
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen()
        self._server = ProcessWatch(server_pid)
        # Everybody who has connected, by descriptor; models, which have said Hello, with their process id.
        self._connections: dict[int, Connection] = {}
        self._clients: dict[Connection, int] = {}
        self._owners: dict[str, Connection] = {}
        self._news: defaultdict[Connection, HeldUpdates] = defaultdict(HeldUpdates)
        self._facts: EngineFacts | None = None
        self._read_stats: Callable[[], EngineStats] | None = None
        self._first_client_deadline_s: float | None = time.monotonic() + _FIRST_CLIENT_TIMEOUT_S
        self._shares_cores = False
        self._pause_s = 0.0
        self._is_draining = False
        self._is_shutting_down = False
        self._has_cancelled_all = False
        self._has_signal_handlers = False
        self._wakeup, self._signal_end = socket.socketpair()
        self._poller = select.poll()
        for descriptor in (self._listener.fileno(), self._wakeup.fileno(), self._server.fileno()):
            if descriptor is not None:
                self._poller.register(descriptor, select.POLLIN)

    def install_signal_handlers(self) -> None:
        """SIGTERM ends the engine in order; the terminal's SIGINT is the server's business, which drains first."""
        self._wakeup.setblocking(False)
        self._signal_end.setblocking(False)
        signal.set_wakeup_fd(self._signal_end.fileno(), warn_on_full_buffer=False)
        self._has_signal_handlers = True
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report_progress(self, phase: str, done: int, total: int) -> None:
        """Tells every attached client how far loading is.

        Raises:
            SystemExit: nobody waits for the engine any more.
        """
        self._receive(timeout_s=0.0)
        if self._is_shutting_down:
            raise SystemExit(0)
        self._broadcast(Progress(phase=phase, done=done, total=total))

    def report_ready(self, facts: EngineFacts, read_stats: Callable[[], EngineStats]) -> None:
        """Opens the engine for requests. `read_stats` is called between steps only."""
        self._facts = facts
        self._shares_cores = facts.device == "cpu"
        self._read_stats = read_stats
        self._broadcast(Ready(core_pid=os.getpid(), facts=facts))

    def report_load_failure(self, code: ErrorCode, message: str) -> None:
        """Tells the clients, the ones included that have just connected, why there will be no engine."""
        deadline_s = time.monotonic() + _LAST_WORDS_TIMEOUT_S
        self._receive(timeout_s=0.0)
        while not self._clients and time.monotonic() < deadline_s:
            self._receive(timeout_s=0.05)
        self._broadcast(LoadFailed(code=code, message=message))

    def drain(self, timeout_s: float) -> list[Command]:
        """Returns what clients asked for since the last call; waits for it up to `timeout_s`."""
        self._send_news()
        timeout_s, self._pause_s = max(timeout_s, self._pause_s), 0.0
        deadline_s = time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline_s - time.monotonic())
            if self._server.fileno() is None:
                remaining_s = min(remaining_s, _POLL_INTERVAL_S)
            commands = self._receive(remaining_s)
            if self._is_shutting_down:
                return [*commands, *self._shutdown_commands()]
            if commands or time.monotonic() >= deadline_s:
                return commands

    def emit(self, updates: list[RequestUpdate]) -> None:
        """Sends each client its part of the step's news as one message, now or with a later step's."""
        if self._shares_cores and len(self._owners) == 1:
            self._pause_s = _FIRST_TOKEN_PAUSE_S if self._is_first(updates[0]) else 0.0
        for update in updates:
            finished = update.finish_reason is not None
            owner = self._owners.pop(update.request_id, None) if finished else self._owners.get(update.request_id)
            if owner is not None:
                self._news[owner].add(update)
        self._send_news()

    def close(self) -> None:
        """Sends what is unsent, and closes the socket and its connections. Idempotent."""
        self._listener.close()
        for connection in self._connections.values():
            connection.close(_LINGER_S)
        self._connections.clear()
        self._clients.clear()
        self._server.close()
        if self._has_signal_handlers:
            signal.set_wakeup_fd(-1)
            self._has_signal_handlers = False
        self._wakeup.close()
        self._signal_end.close()

    def _shutdown_commands(self) -> list[Command]:
        # First the running requests end as cancelled, then the loop: what is unfinished then would count as lost.
        if self._owners and not self._has_cancelled_all:
            self._has_cancelled_all = True
            return [Cancel(request_ids=list(self._owners))]
        return [Shutdown()]

    def _receive(self, timeout_s: float) -> list[Command]:
        commands: list[Command] = []
        has_server_ended = self._server.fileno() is None and not self._server.is_alive()
        for descriptor, events in self._poller.poll(math.ceil(timeout_s * 1000)):
            if (connection := self._connections.get(descriptor)) is not None:
                commands += self._serve(connection, events)
            elif descriptor == self._listener.fileno():
                self._accept()
            elif descriptor == self._wakeup.fileno():
                self._wakeup.recv(64)
            else:
                has_server_ended = True
        if has_server_ended:
            _LOGGER.warning("the Triton server died; the engine core ends")
            self._is_shutting_down = True
        if self._first_client_deadline_s is not None and time.monotonic() > self._first_client_deadline_s:
            _LOGGER.warning("no model has attached; the engine core ends")
            self._is_shutting_down = True
        return commands

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except BlockingIOError:
                return
            connection = Connection(stream)
            self._connections[connection.fileno()] = connection
            self._poller.register(connection, select.POLLIN)

    def _serve(self, connection: Connection, events: int) -> Iterable[Command]:
        """Does what a connection is ready for."""
        if events & select.POLLOUT:
            connection.flush()
            self._poller.modify(connection, connection.wanted_events)
        for message in connection.receive():
            try:
                frame = decode_client_frame(message)
            except msgspec.DecodeError:
                # Only our own models can reach the socket, so this is a bug, not an attack; the others go on.
                _LOGGER.exception("a client sent a message that is not one of ours")
                continue
            yield from self._handle(connection, frame)
        if connection.is_closed:
            if (pid := self._clients.get(connection)) is not None:
                _LOGGER.warning("model process %d died; its requests are cancelled", pid)
            yield from self._detach(connection)
            self._poller.unregister(connection)
            del self._connections[connection.fileno()]
            connection.close()

    def _handle(self, client: Connection, frame: ClientFrame) -> Iterable[Command]:
        match frame:
            case Hello():
                self._attach(client, frame)
            case Add() if self._is_draining:
                self._send(client, Updates(updates=[_refusal(frame.request.request_id)]))
            case Add():
                self._owners[frame.request.request_id] = client
                self._news[client].expect(frame.request)
                yield frame
            case Hold():
                self._news[client].hold(frame.until_s)
            case Cancel():
                yield frame
            case GetStats():
                if self._read_stats is not None:
                    self._send(client, Stats(ticket=frame.ticket, stats=self._read_stats()))
            case Drain():
                _LOGGER.info("draining: new requests are refused, running ones are finished")
                self._is_draining = True
            case Goodbye():
                yield from self._detach(client)

    def _attach(self, client: Connection, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            message = "the model and the engine core are of different versions; restart the server"
            self._send(client, LoadFailed(code=ErrorCode.INTERNAL, message=message))
            return
        self._clients[client] = hello.pid
        self._first_client_deadline_s = None
        if self._facts is not None:
            self._send(client, Ready(core_pid=os.getpid(), facts=self._facts))

    def _detach(self, client: Connection) -> Iterable[Command]:
        self._news.pop(client, None)
        if self._clients.pop(client, None) is None:
            return
        orphans = [request_id for request_id, owner in self._owners.items() if owner is client]
        for request_id in orphans:
            del self._owners[request_id]
        if orphans:
            yield Cancel(request_ids=orphans)
        if not self._clients:
            _LOGGER.info("the last model has left; the engine core ends")
            self._is_shutting_down = True

    def _send_news(self) -> None:
        now_s = time.monotonic()
        for client, news in self._news.items():
            if updates := news.take(now_s):
                self._send(client, Updates(updates=updates))

    def _is_first(self, update: RequestUpdate) -> bool:
        owner = self._owners.get(update.request_id)
        return owner is not None and self._news[owner].is_new(update.request_id) and update.finish_reason is None

    def _broadcast(self, frame: CoreFrame) -> None:
        for client in self._clients:
            self._send(client, frame)

    def _send(self, client: Connection, frame: CoreFrame) -> None:
        client.send(encode(frame))
        if client.has_backlog:
            self._poller.modify(client, client.wanted_events)

    def _on_sigterm(self, signal_number: int, stack: FrameType | None) -> None:
        del signal_number, stack
        self._is_shutting_down = True


def _refusal(request_id: str) -> RequestUpdate:
    return RequestUpdate(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error_code=ErrorCode.BUSY,
        error="the server is shutting down; send the request to another, or later",
    )
