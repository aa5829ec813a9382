# SPDX-License-Identifier: Apache-2.0
"""The loop around the core: commands in, steps, one list of updates out per step.

It runs in a thread of the offline API and in the main thread of the core process; only the inbox and the
emitter differ. Every request that reaches the loop gets its end, a refused one too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from wavetrain_engine.command import Add, Cancel, Command
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.core.outputs import rejection
from wavetrain_engine.errors import EngineDead, RequestFailed, WavetrainError
from wavetrain_engine.request import EngineRequest, RequestUpdate

_IDLE_TIMEOUT_S = 1.0  # an idle engine looks after itself this often

_logger = logging.getLogger(__name__)


class Inbox(Protocol):
    """Where commands come from."""

    def drain(self, timeout_s: float) -> list[Command]:
        """Returns all commands there are; where there are none, waits for up to `timeout_s` for the first."""
        ...


class EngineLoop:
    """Runs an EngineCore until it is told to stop.

    Args:
        emit: gets one non-empty list per step, in order; called from the thread of `run` only.
    """

    def __init__(self, core: EngineCore, inbox: Inbox, emit: Callable[[list[RequestUpdate]], None]) -> None:
        self._core = core
        self._inbox = inbox
        self._emit = emit
        self._updates: list[RequestUpdate] = []
        self._is_shut_down = False

    def run(self) -> None:
        """Runs until a Shutdown command; unfinished requests then end with EngineDead.

        Whoever feeds the inbox refuses requests once this returned or raised: nobody reads them any more.

        Raises:
            BaseException: what a step raised, after every unfinished request has ended with EngineDead.
        """
        try:
            self._run()
        except BaseException:
            self._end(EngineDead("the engine failed and lost this request; send it again once the engine is back"))
            raise
        self._end(EngineDead("the engine was shut down before this request was finished; send it again elsewhere"))

    def _run(self) -> None:
        is_checked = False
        while not self._is_shut_down:
            commands = self._inbox.drain(0.0 if self._core.has_work else _IDLE_TIMEOUT_S)
            self._apply(commands)
            if self._core.has_work:
                is_checked = False
                self._updates += self._core.step()
            elif not commands and not is_checked:  # not at the end of each burst: it takes a while
                self._core.check()
                is_checked = True
            self._flush()

    def _apply(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Add):
                self._add(command.request)
            elif isinstance(command, Cancel):
                for request_id in command.request_ids:
                    self._core.cancel(request_id)
            else:
                self._is_shut_down = True

    def _add(self, request: EngineRequest) -> None:
        try:
            self._core.add_request(request)
        except WavetrainError as error:
            self._updates.append(rejection(request.request_id, error))
        except Exception:
            _logger.exception("request %s could not be accepted", request.request_id)
            error = RequestFailed("the engine could not accept this request; its operator finds the cause in the log")
            self._updates.append(rejection(request.request_id, error))

    def _end(self, error: EngineDead) -> None:
        """Ends what is unfinished, and refuses what reached the inbox meanwhile."""
        self._updates += self._core.end_all(error)
        self._flush()
        self._apply(self._inbox.drain(0.0))
        self._flush()

    def _flush(self) -> None:
        if self._updates:
            updates, self._updates = self._updates, []
            self._emit(updates)
