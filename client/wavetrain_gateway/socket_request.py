# SPDX-License-Identifier: Apache-2.0
"""A request of a WebSocket: it runs by itself, and keeps its events for whoever attaches to it.

running ──last event──▶ over ──resume_s──▶ forgotten
   │ detached for resume_s: cancelled, over
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from wavetrain_gateway.answers import Answer
from wavetrain_gateway.bodies import parse_json
from wavetrain_gateway.errors import GatewayError, NotFound, RequestCancelled
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.feed import Feed
from wavetrain_gateway.generation import admitted, answer_id, as_gateway_error, check_plan, open_feed, prompt_texts
from wavetrain_gateway.plan import Plan
from wavetrain_gateway.services import Services


class SocketRequest:
    """One generation, and its events, numbered from 1.

    Args:
        name: the caller's id of it.
        on_over: called when it is forgotten.
    """

    def __init__(
        self, name: str, plan: Plan, exchange: Exchange, services: Services, on_over: Callable[[SocketRequest], None]
    ) -> None:
        self.name = name
        self.owner = exchange.caller.name
        self._plan = plan
        self._exchange = exchange
        self._services = services
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._max_chars = services.settings.flow.max_buffered_chars
        self._resume_s = services.settings.flow.resume_s
        self._events: deque[str] = deque()
        self._first_event = 1
        self._num_chars = 0
        self._feed: Feed | None = None
        self._early_failure: GatewayError | None = None
        self._reader: Callable[[], None] | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._timer: asyncio.TimerHandle | None = None
        self.is_over = False
        self._task = self._loop.create_task(self._run())

    @property
    def next_event(self) -> int:
        """The number that the next event will have."""
        return self._first_event + len(self._events)

    def attach(self, after: int, wake: Callable[[], None]) -> int:
        """Gives events to a reader from now on; returns the first number it may ask for.

        Args:
            after: the last event that the reader has.
            wake: called when there are new events.

        Raises:
            NotFound: the events that follow are not kept any more, or were never there.
        """
        if not self._first_event - 1 <= after < self.next_event:
            raise NotFound(
                f"event {after} of this request is not kept; those after {self._first_event - 1} are",
                code="events_gone",
                param="after",
            )
        self._reader = wake
        if self._timer is not None and not self.is_over:
            self._timer.cancel()
            self._timer = None
        return after + 1

    def detach(self, wake: Callable[[], None]) -> None:
        """Takes the reader away, if it is this one; without another for a while the request ends."""
        if self._reader != wake:
            return
        self._reader = None
        self._has_room.set()
        if not self.is_over:
            self._timer = self._loop.call_later(self._resume_s, self.cancel)

    def read(self, number: int) -> str | None:
        """Returns an event as a frame; None where it is not there yet."""
        index = number - self._first_event
        return self._events[index] if 0 <= index < len(self._events) else None

    def has_been_read(self, *, is_behind: bool) -> None:
        """The reader tells whether it is behind; then news are gathered until it is not."""
        if is_behind:
            self._has_room.clear()
        else:
            self._has_room.set()

    def cancel(self) -> None:
        """Ends it early; an error event follows."""
        failure = RequestCancelled("the request was cancelled")
        if self._feed is not None:
            self._feed.fail(failure)
        else:
            self._early_failure = failure

    async def close(self) -> None:
        """Ends it at once, without events."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        exchange = self._exchange
        try:
            with self._services.lifecycle.active():
                await self._generate()
        except asyncio.CancelledError:
            exchange.record.error_code = "server_shutdown"
            raise
        except Exception as error:
            failure = as_gateway_error(error, self._services, exchange.request_id)
            exchange.record.status = failure.status
            exchange.record.error_code = failure.code or failure.type
            self._add("error", "error", json.dumps(failure.body(exchange.request_id)["error"]))
        finally:
            self._services.note_end(exchange)
            self._end()

    async def _generate(self) -> None:
        services, exchange, plan = self._services, self._exchange, self._plan
        check_plan(exchange, services, plan)
        exchange.record.is_streamed = True
        timeout_s = exchange.timeout_s(services.settings.flow.total_timeout_s)
        async with admitted(exchange, services, plan):
            echoed = await prompt_texts(plan, services, timeout_s)
            answer = Answer(plan, answer_id(plan, exchange.request_id), int(time.time()), echoed, is_kept=False)
            async with open_feed(plan, exchange, services, timeout_s) as feed:
                self._feed = feed
                if self._early_failure is not None:
                    feed.fail(self._early_failure)
                with services.lifecycle.running(exchange.request_id, self.owner, feed):
                    self._add("accepted", "request_id", json.dumps(exchange.request_id))
                    await self._tell(feed, answer)
            exchange.record.status = 200
            exchange.record.finish_reasons = answer.finish_reasons()
            self._add("done", "usage", json.dumps(answer.usage(feed.stats)))

    async def _tell(self, feed: Feed, answer: Answer) -> None:
        while news := await feed.take():
            for item in news:
                for piece in answer.pieces(item, feed.stats):
                    self._add("event", "data", piece)
            if not self._has_room.is_set():
                await self._has_room.wait()

    def _add(self, kind: str, field: str, value: str) -> None:
        frame = f'{{"type":"{kind}","id":{json.dumps(self.name)},"event":{self.next_event},"{field}":{value}}}'
        self._events.append(frame)
        self._num_chars += len(frame)
        while self._num_chars > self._max_chars and len(self._events) > 1:
            self._num_chars -= len(self._events.popleft())
            self._first_event += 1
        if self._reader is not None:
            self._reader()

    def _end(self) -> None:
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._resume_s, self._on_over, self)


def parse_frame(text: str) -> dict[str, Any] | None:
    """A frame's JSON object; None where it is none."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None  # pyright: ignore[reportUnknownVariableType]
