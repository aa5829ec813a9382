# SPDX-License-Identifier: Apache-2.0
"""A model's end of the socket: attaches to the engine core, starts it where needed, survives its death.

One I/O thread owns the connection and hears from the core; callers send on it themselves. Invariants:
    1. every submitted request gets updates that end with exactly one with a finish reason, whatever happens;
       when the core dies that is a `dead` error, sent at once
    2. a request is only ever sent to the core that was alive when it was submitted: each core has a connection of
       its own, so nothing waits in a queue for its successor
    3. a core that crashed is started again, later and later the sooner it crashes; one that cannot load is not
    4. a loaded core that does not finish a step in time counts as crashed: its requests end, it is killed
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from wavetrain_engine.command import Add, Cancel
from wavetrain_engine.errors import CheckpointError, EngineDead, ErrorCode, WavetrainError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.ipc.connection import Connection
from wavetrain_engine.ipc.core_launcher import CoreLauncher
from wavetrain_engine.ipc.core_watchdog import CoreWatchdog
from wavetrain_engine.ipc.frames import (
    CoreFrame,
    GetStats,
    Goodbye,
    Hello,
    Hold,
    LoadFailed,
    Progress,
    Ready,
    Stats,
    Updates,
    decode_core_frame,
    encode,
)
from wavetrain_engine.ipc.process_watch import ProcessWatch
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.stats import EngineStats

_LOGGER = logging.getLogger(__name__)
Sink = Callable[[RequestUpdate], None]
# Deals with the news that sinks were given. Returns after how many seconds there is more to do; None: with news.
AfterNews = Callable[[], float | None]

MAX_RESTART_DELAY_S = 30.0
_FIRST_RESTART_DELAY_S = 0.5
# A core that ran this long has not crashed in a loop: the next restart is immediate again.
_STABLE_AFTER_S = 60.0
_MAX_CRASHES_WHILE_LOADING = 3
_POLL_INTERVAL_MS = 500
_CLOSE_TIMEOUT_S = 10.0
# A core binds its socket a moment after it was started.
_CONNECT_INTERVAL_S = 0.02
_LINGER_S = 0.5
# Of a question that only wants to be answered.
_NO_TICKET = 0

_DIED = "the engine core died; send the request again"
_HUNG = "the engine core did not finish a step in time and is ended; send the request again"
_RESTARTING = "the engine core is restarting; try again"
_LOST = "the engine core cannot be loaded again; the server has to be restarted, its log says why"


class CoreClient:
    """Submits requests to the engine core of this server and hands the updates to their sinks.

    `submit`, `cancel`, `hold` and `read_stats` may be called from any thread. Sinks are called on the I/O thread, in
    order; they, and what is called after them, must be quick and must not raise.
    """

    def __init__(
        self,
        engine_config: Path,
        runtime_dir: RuntimeDir,
        server_pid: int,
        command: Sequence[str] = (),
        *,
        step_timeout_s: float = 0.0,
    ) -> None:
        """Prepares, starts nothing.

        Args:
            command: replaces the core process's command line, for tests.
            step_timeout_s: how long a step may take before the core counts as hung; 0: any time.
        """
        self._runtime_dir = runtime_dir
        self._step_timeout_s = step_timeout_s
        self._launcher = CoreLauncher(engine_config, runtime_dir, server_pid, command)
        self._lock = threading.Lock()
        self._pending: dict[str, Sink] = {}
        self._tickets: dict[int, Future[EngineStats]] = {}
        self._last_ticket = 0
        self._connection: Connection | None = None
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._facts: EngineFacts | None = None
        self._core_pid: int | None = None
        self._load_error: WavetrainError | None = None
        self._is_ready = False
        self._is_closing = False
        self._settled = threading.Event()  # ready, or never to be
        self._num_crashes = 0
        self._clients_lock: int | None = None
        self._after_news: AfterNews = _nothing_to_do
        self._thread = threading.Thread(target=self._run, name="core-client", daemon=True)

    def start(self, after_news: AfterNews | None = None) -> EngineFacts:
        """Attaches to the core, starting it where none runs, and waits until it is loaded.

        `after_news` is called on the I/O thread when it has called sinks, and when the time it asked for has come.

        Raises:
            CheckpointError: the engine cannot be loaded; the message is the core's.
            EngineDead: the core crashed again and again while it loaded.
        """
        if after_news is not None:
            self._after_news = after_news
        self._clients_lock = self._runtime_dir.join_clients()
        self._thread.start()
        self._settled.wait()
        if self._load_error is not None:
            raise self._load_error
        return self.facts

    @property
    def facts(self) -> EngineFacts:
        """What the engine found out at load.

        Raises:
            EngineDead: it has never been loaded.
        """
        if self._facts is None:
            raise EngineDead(_RESTARTING)
        return self._facts

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken now. Costs nothing; suits a readiness hook."""
        return self._is_ready

    @property
    def core_pid(self) -> int | None:
        """The running core's process id; None while there is none."""
        return self._core_pid

    def submit(self, requests: Sequence[EngineRequest], make_sink: Callable[[], Sink]) -> None:
        """Hands requests to the core, all of them; the sink that is made once it has them gets their updates.

        Raises:
            EngineDead: there is no core right now; none was handed over, no sink is made.
            Exception: what `make_sink` raises; the requests are ended.
        """
        request_ids = [request.request_id for request in requests]
        messages = [encode(Add(request=request)) for request in requests]
        with self._lock:
            if not self._is_ready:
                raise EngineDead(_RESTARTING if self._load_error is None else _LOST)
            for message in messages:
                self._send(message)
            try:
                # The core begins meanwhile, and its news wait for the lock.
                sink = make_sink()
            except BaseException:
                self._send(encode(Cancel(request_ids=request_ids)))
                raise
            self._pending.update(dict.fromkeys(request_ids, sink))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Ends requests; each still gets its last update. Unknown and finished ones are no error."""
        with self._lock:
            if self._is_ready:
                self._send(encode(Cancel(request_ids=list(request_ids))))

    def hold(self, until_s: float) -> None:
        """Lets the core collect news until this `time.monotonic()`, but for those that callers wait for."""
        with self._lock:
            if self._is_ready:
                self._send(encode(Hold(until_s=until_s)))

    def read_stats(self, timeout_s: float = 5.0) -> EngineStats:
        """Asks the core for its counters.

        Raises:
            EngineDead: there is no core, or it died before it answered.
            concurrent.futures.TimeoutError: it did not answer in time.
        """
        future: Future[EngineStats] = Future()
        with self._lock:
            if not self._is_ready:
                raise EngineDead(_RESTARTING)
            self._last_ticket += 1
            ticket = self._last_ticket
            self._tickets[ticket] = future
            self._send(encode(GetStats(ticket=ticket)))
        try:
            return future.result(timeout_s)
        finally:
            self._tickets.pop(ticket, None)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Leaves the core, and ends it where nobody else needs it: by itself if it will, else by force.

        Pending requests end with `cancelled`. Returns within about `timeout_s`. Idempotent.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
        if was_closing:
            return
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._clients_lock is not None and self._runtime_dir.leave_clients(self._clients_lock):
            self._launcher.end_core(max(0.5, deadline_s - time.monotonic()))
            self._runtime_dir.remove()
        os.close(self._wakeup)

    def _send(self, message: bytes) -> None:
        """Sends to the core that is ready. To be called under the lock, so that none is sent to its successor."""
        assert self._connection is not None, "a ready core is connected"
        self._connection.send(message)
        if self._connection.has_backlog:
            os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        try:
            while not self._is_closing and self._load_error is None:
                started_s = time.monotonic()
                watch = ProcessWatch(self._launcher.find_or_start())
                try:
                    self._serve(watch)
                    self._after_core(watch, started_s)
                finally:
                    watch.close()
        except Exception as error:  # a thread that dies silently would leave every caller waiting
            _LOGGER.exception("the connection to the engine core failed")
            self._give_up(EngineDead(f"the connection to the engine core failed: {type(error).__name__}"))

    def _serve(self, watch: ProcessWatch) -> None:
        """Speaks with one core until it ends or we leave."""
        connection = self._connect(watch)
        if connection is None:
            return
        with self._lock:
            self._connection = connection
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        poller.register(self._wakeup, select.POLLIN)
        watchdog = CoreWatchdog(self._step_timeout_s)
        wait_s: float | None = None
        try:
            connection.send(encode(Hello(pid=os.getpid())))
            while not self._is_closing and not connection.is_closed:
                wait_ms = _POLL_INTERVAL_MS if wait_s is None else min(_POLL_INTERVAL_MS, math.ceil(wait_s * 1000))
                ready = dict(poller.poll(wait_ms))
                if ready.get(connection.fileno(), 0) & ~select.POLLOUT:
                    self._receive(connection)
                    watchdog.hear()
                wait_s = self._after_news()
                if self._wakeup in ready:
                    os.eventfd_read(self._wakeup)
                self._look_after(connection, watch, watchdog)
                if connection.has_backlog:
                    connection.flush()
                poller.modify(connection, connection.wanted_events)
            connection.send(encode(Goodbye()))
        finally:
            connection.close(_LINGER_S)

    def _connect(self, watch: ProcessWatch) -> Connection | None:
        """Returns None when the core has ended, or we leave, before it listened."""
        path = self._runtime_dir.socket_path(watch.pid)
        while not self._is_closing:
            was_alive = watch.is_alive()
            try:
                return Connection.to(path)
            except OSError:
                if not was_alive:
                    return None
                time.sleep(_CONNECT_INTERVAL_S)
        return None

    def _look_after(self, connection: Connection, watch: ProcessWatch, watchdog: CoreWatchdog) -> None:
        """Ends a loaded core that hangs; that it has died is then seen as of any other."""
        watchdog.tick()
        if not self._is_ready:  # it loads, which may take long, or its end is near
            watchdog.hear()
        elif watchdog.take_question():
            connection.send(encode(GetStats(ticket=_NO_TICKET)))
        elif watchdog.is_hung:
            _LOGGER.error("the engine core did not finish a step within %g s; it is killed", watchdog.limit_s)
            self._end_pending(ErrorCode.DEAD, _HUNG)
            if watch.is_alive():
                self._launcher.kill_core(watch.pid)

    def _receive(self, connection: Connection) -> None:
        for message in connection.receive():
            self._handle(decode_core_frame(message))

    def _handle(self, frame: CoreFrame) -> None:
        match frame:
            case Updates():
                self._deliver(frame.updates)
            case Ready():
                with self._lock:
                    self._facts, self._core_pid, self._is_ready = frame.facts, frame.core_pid, True
                self._settled.set()
            case Progress():
                _LOGGER.debug("the engine loads: %s %d of %d", frame.phase, frame.done, frame.total)
            case LoadFailed():
                self._give_up(_load_error(frame))
            case Stats():
                future = self._tickets.pop(frame.ticket, None)
                if future is not None:
                    future.set_result(frame.stats)

    def _deliver(self, updates: Sequence[RequestUpdate]) -> None:
        with self._lock:
            sinks = [self._sink_of(update) for update in updates]
        for sink, update in zip(sinks, updates, strict=True):
            if sink is not None:
                sink(update)

    def _sink_of(self, update: RequestUpdate) -> Sink | None:
        is_last = update.finish_reason is not None
        return self._pending.pop(update.request_id, None) if is_last else self._pending.get(update.request_id)

    def _after_core(self, watch: ProcessWatch, started_s: float) -> None:
        """Ends what was pending with the core that is gone, and waits before the next one."""
        lived_s = time.monotonic() - started_s
        was_ready = self._core_pid is not None
        if self._is_closing:
            num_pending = self._end_pending(ErrorCode.CANCELLED, "the server is shutting down")
        else:
            num_pending = self._end_pending(ErrorCode.DEAD, _DIED)
        self._core_pid = None
        if self._is_closing or self._load_error is not None:
            return
        self._launcher.await_end(watch, _CLOSE_TIMEOUT_S)
        self._num_crashes = 1 if was_ready and lived_s > _STABLE_AFTER_S else self._num_crashes + 1
        _LOGGER.error("the engine core died with %d requests running", num_pending)
        if self._facts is None and self._num_crashes >= _MAX_CRASHES_WHILE_LOADING:
            self._give_up(EngineDead("the engine core crashed while it loaded; its log says why"))
            return
        self._wait_before_restart()

    def _end_pending(self, code: ErrorCode, message: str) -> int:
        """Takes no more requests and ends those there are; returns how many there were."""
        with self._lock:
            self._is_ready = False
            pending, self._pending = self._pending, {}
            tickets, self._tickets = self._tickets, {}
        for future in tickets.values():
            future.set_exception(EngineDead(message))
        reason = FinishReason.CANCELLED if code is ErrorCode.CANCELLED else FinishReason.ERROR
        for request_id, sink in pending.items():
            sink(RequestUpdate(request_id=request_id, finish_reason=reason, error_code=code, error=message))
        self._after_news()
        return len(pending)

    def _wait_before_restart(self) -> None:
        # The first restart is immediate: a lone crash should cost no more than the load.
        delay_s = 0.0
        if self._num_crashes > 1:
            delay_s = min(MAX_RESTART_DELAY_S, _FIRST_RESTART_DELAY_S * 2 ** (self._num_crashes - 2))
        deadline_s = time.monotonic() + delay_s
        while not self._is_closing and time.monotonic() < deadline_s:
            time.sleep(min(0.05, delay_s))

    def _give_up(self, error: WavetrainError) -> None:
        _LOGGER.error("the engine cannot be loaded: %s", error)
        with self._lock:
            self._is_ready = False
            self._load_error = error
        self._settled.set()


def _nothing_to_do() -> float | None:
    return None


def _load_error(frame: LoadFailed) -> WavetrainError:
    # The class is lost on the way; the message already says which file or key it was.
    return CheckpointError(frame.message) if frame.code is ErrorCode.INVALID else EngineDead(frame.message)
