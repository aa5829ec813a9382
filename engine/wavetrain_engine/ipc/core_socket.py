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
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import msgspec
import zmq

from wavetrain_engine.command import Add, Cancel, Command, Shutdown
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.facts import EngineFacts
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
# Pids without a pidfd are looked at this often.
_POLL_INTERVAL_S = 0.2
# Where the engine computes on the cores that also send, a first token waits beside the next step at each of the ten
# threads it passes on its way out, 2 ms undisturbed. A lone request's next step waits instead; nobody else pays.
_FIRST_TOKEN_PAUSE_S = 0.003


class CoreSocket:
    """Binds the core's socket and speaks the protocol of `frames` on it."""

    def __init__(self, address: str, server_pid: int) -> None:
        """Binds `address` and watches the Triton server's process.

        Raises:
            zmq.ZMQError: the address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # No high-water mark: a ROUTER drops what does not fit. What a client can leave unread is bounded by the
        # requests it may have running.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._server = ProcessWatch(server_pid)
        self._clients: dict[bytes, ProcessWatch] = {}
        self._owners: dict[str, bytes] = {}
        self._news: defaultdict[bytes, HeldUpdates] = defaultdict(HeldUpdates)
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
        for descriptor in (self._wakeup.fileno(), self._server.fileno()):
            if descriptor is not None:
                self._poller.register(descriptor, zmq.POLLIN)
        self._needs_polling = self._server.fileno() is None

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
            if self._needs_polling:
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
        """Flushes and closes the socket. Idempotent."""
        for watch in (*self._clients.values(), self._server):
            watch.close()
        self._clients.clear()
        self._socket.close()
        self._context.term()
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
        ready = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        commands: list[Command] = []
        if self._wakeup.fileno() in ready:
            self._wakeup.recv(64)
        if self._socket in ready:
            commands += self._read_messages()
        self._check_processes(ready, commands)
        return commands

    def _read_messages(self) -> Iterable[Command]:
        while True:
            try:
                client, message = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                frame = decode_client_frame(message)
            except msgspec.DecodeError:
                # Only our own models can reach the socket, so this is a bug, not an attack; the others go on.
                _LOGGER.exception("a client sent a message that is not one of ours")
                continue
            yield from self._handle(client, frame)

    def _handle(self, client: bytes, frame: ClientFrame) -> Iterable[Command]:
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

    def _attach(self, client: bytes, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            message = "the model and the engine core are of different versions; restart the server"
            self._send(client, LoadFailed(code=ErrorCode.INTERNAL, message=message))
            return
        watch = ProcessWatch(hello.pid)
        self._clients[client] = watch
        self._first_client_deadline_s = None
        descriptor = watch.fileno()
        if descriptor is None:
            self._needs_polling = True
        else:
            self._poller.register(descriptor, zmq.POLLIN)
        if self._facts is not None:
            self._send(client, Ready(core_pid=os.getpid(), facts=self._facts))

    def _detach(self, client: bytes) -> Iterable[Command]:
        watch = self._clients.pop(client, None)
        self._news.pop(client, None)
        if watch is None:
            return
        descriptor = watch.fileno()
        if descriptor is not None:
            self._poller.unregister(descriptor)
        watch.close()
        orphans = [request_id for request_id, owner in self._owners.items() if owner == client]
        for request_id in orphans:
            del self._owners[request_id]
        if orphans:
            yield Cancel(request_ids=orphans)
        if not self._clients:
            _LOGGER.info("the last model has left; the engine core ends")
            self._is_shutting_down = True

    def _check_processes(self, ready: dict[Any, int], commands: list[Command]) -> None:
        for client, watch in list(self._clients.items()):
            if self._has_ended(watch, ready):
                _LOGGER.warning("model process %d died; its requests are cancelled", watch.pid)
                commands.extend(self._detach(client))
        if self._has_ended(self._server, ready):
            _LOGGER.warning("the Triton server died; the engine core ends")
            self._is_shutting_down = True
        if self._first_client_deadline_s is not None and time.monotonic() > self._first_client_deadline_s:
            _LOGGER.warning("no model has attached; the engine core ends")
            self._is_shutting_down = True

    @staticmethod
    def _has_ended(watch: ProcessWatch, ready: dict[Any, int]) -> bool:
        descriptor = watch.fileno()
        return descriptor in ready if descriptor is not None else not watch.is_alive()

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

    def _send(self, client: bytes, frame: CoreFrame) -> None:
        self._socket.send_multipart([client, encode(frame)])

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
