# SPDX-License-Identifier: Apache-2.0
"""The engine in a thread of this process: the in-process twin of the core process and its client.

Invariants:
    1. every submitted request's sink gets updates that end with exactly one with a finish reason
    2. the core and the executor are touched by the engine thread alone, until it has ended
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from wavetrain_engine.command import Add, Cancel, Command, Shutdown
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.core.engine_loop import EngineLoop
from wavetrain_engine.core.outputs import rejection
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import EngineDead, RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.plan import Executor
from wavetrain_engine.request import EngineRequest, RequestUpdate
from wavetrain_engine.request_tracer import RequestTracer
from wavetrain_engine.stats import EngineStats
from wavetrain_engine.worker_import import import_worker

_logger = logging.getLogger(__name__)

Sink = Callable[[RequestUpdate], None]
_CLOSED = "the engine is closed; make a new one"
_DIED = "the engine failed and cannot go on; make a new one"
_FORKED = "the engine belongs to the process that made it, and threads do not survive a fork; make one in this process"


LoadExecutor = Callable[[], tuple[Executor, EngineFacts]]


class LocalEngine:
    """Runs an executor's EngineLoop in a daemon thread. All methods may be called from any thread.

    It owns the executor and shuts it down with itself. Sinks are called on the engine thread, in order;
    they must be quick and must not raise.
    """

    def __init__(self, config: EngineConfig, load: LoadExecutor) -> None:
        """Has the engine thread call `load`, and waits until it is done.

        The thread that loads is the one that computes: once two threads have used OpenMP, its workers are more than
        the cores, it stops spinning between operators, and a step takes 1.4 times as long (measured on two cores).

        Raises:
            Exception: what `load` raised.
        """
        self._inbox = _ThreadInbox()
        self._sinks: dict[str, Sink] = {}
        self._lock = threading.Lock()
        self._is_open = True
        self._failure: BaseException | None = None
        loaded: Future[EngineFacts] = Future()
        self._thread = threading.Thread(
            target=self._load_and_run, args=(config, load, loaded), name="wavetrain-engine", daemon=True
        )
        self._thread.start()
        self.facts = loaded.result()

    @classmethod
    def load(cls, config: EngineConfig) -> LocalEngine:
        """Loads the checkpoint that `config` names, and starts.

        Raises:
            ConfigError: a flag does not fit the model or the machine.
            CheckpointError: the checkpoint is missing, broken or not supported.
        """
        return cls(config, partial(import_worker(), config, environment=Environment.read()))

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return self._is_open

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Hands a request to the engine; `sink` gets its updates from now on, a refusal too.

        Raises:
            EngineDead: the engine is closed or has failed; the sink is never called.
            RequestError: an unfinished request has the same id; the sink is never called.
        """
        with self._lock:
            self._check_alive()
            if request.request_id in self._sinks:
                raise RequestError(
                    f"request_id {request.request_id!r} is in use by an unfinished request; choose another"
                )
            self._sinks[request.request_id] = sink
            self._inbox.put(Add(request))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Ends requests; each still gets its last update. Unknown and finished ones are no error."""
        self._inbox.put(Cancel(list(request_ids)))

    def read_stats(self) -> EngineStats:
        """Returns the core's counters, taken between two steps.

        Raises:
            EngineDead: the engine is closed or has failed.
        """
        answer: Future[EngineStats] = Future()
        with self._lock:
            self._check_alive()
            self._inbox.put(answer)
        return answer.result()

    def close(self) -> None:
        """Ends unfinished requests with EngineDead, waits for the step in flight, frees the device. Idempotent."""
        self._inbox.put(Shutdown())
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_alive(self) -> None:
        if not self._is_open:
            raise EngineDead(_CLOSED if self._failure is None else _DIED) from self._failure
        if not self._thread.is_alive():  # it closes the engine before it ends, so it never lived in this process
            raise EngineDead(_FORKED)

    def _load_and_run(self, config: EngineConfig, load: LoadExecutor, loaded: Future[EngineFacts]) -> None:
        try:
            executor, facts = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        try:
            tracer = RequestTracer.to(config.observability.otlp_traces_endpoint)
            core = EngineCore(config, facts, executor, on_end=None if tracer is None else tracer.record)
        except BaseException as error:
            executor.shutdown()
            loaded.set_exception(error)
            return
        self._inbox.read_stats = core.stats
        loaded.set_result(facts)
        self._run(core, executor)
        if tracer is not None:
            tracer.close()

    def _run(self, core: EngineCore, executor: Executor) -> None:
        try:
            EngineLoop(core, self._inbox, self._dispatch).run()
        except BaseException as error:
            self._failure = error
            _logger.exception("the engine failed")
        finally:
            self._finish(executor)

    def _dispatch(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            if update.finish_reason is None:
                sink = self._sinks.get(update.request_id)
            else:
                sink = self._sinks.pop(update.request_id, None)
            if sink is not None:
                sink(update)

    def _finish(self, executor: Executor) -> None:
        with self._lock:
            self._is_open = False
        # Nothing is submitted any more. What the loop did not see is ended here.
        error = EngineDead(_CLOSED if self._failure is None else _DIED)
        self._inbox.fail(error)
        self._dispatch([rejection(request_id, error) for request_id in list(self._sinks)])
        executor.shutdown()


class _ThreadInbox:
    """Commands from any thread; and questions, which are answered between two steps, where it is safe."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command | Future[EngineStats]] = queue.SimpleQueue()
        self.read_stats: Callable[[], EngineStats] = EngineStats

    def put(self, item: Command | Future[EngineStats]) -> None:
        self._queue.put(item)

    def drain(self, timeout_s: float) -> list[Command]:
        commands: list[Command] = []
        try:
            item = self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
            while True:
                if isinstance(item, Future):
                    item.set_result(self.read_stats())
                else:
                    commands.append(item)
                item = self._queue.get_nowait()
        except queue.Empty:
            return commands

    def fail(self, error: EngineDead) -> None:
        """Answers the questions that are left."""
        try:
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, Future):
                    item.set_exception(error)
        except queue.Empty:
            return
