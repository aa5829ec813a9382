# SPDX-License-Identifier: Apache-2.0
"""The running jobs of one request, and the news that wait for their reader.

    upstream ──chunks──▶ pump (a task for each prompt) ──▶ pending news, coalesced by sequence ──▶ the one reader

Invariants:
    1. a reader that falls behind finds fewer, longer news; no text is lost, doubled or reordered
    2. what waits is bounded: beyond `max_buffered_chars` the pumps stop reading, and the model's stream waits with them
    3. the first failure ends everything: news that came before it are given first, then it is raised
    4. when the `async with` block is left, no job runs upstream any more
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from wavetrain_client import Chunk, ClientError, FinishReason, Logprob, PerfMetrics
from wavetrain_gateway.errors import DeadlinePassed, GatewayError, Unavailable, from_client_error
from wavetrain_gateway.upstream import Job, Upstream

Position = Mapping[int, Logprob]


@dataclass(slots=True)
class News:
    """What one sequence has to say: everything since the reader last asked."""

    prompt_index: int
    sequence_index: int
    text: str = ""
    num_tokens: int = 0
    logprobs: list[Position] = field(default_factory=list[Position])
    finish_reason: FinishReason | None = None
    cumulative_logprob: float | None = None
    prompt_logprobs: Sequence[Position] | None = None


@dataclass(slots=True)
class FeedStats:
    """What is known of a request while it runs, and at its end.

    Attributes:
        first_news_s: loop time of the first chunk; None before.
        num_prompt_tokens: over the prompts that have answered.
        replica: of the first prompt that answered.
    """

    started_s: float
    first_news_s: float | None = None
    last_news_s: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    queue_s: float | None = None
    replica: str = ""


class Feed:
    """Runs jobs and hands their news to one reader.

    Args:
        max_running: jobs that run at the same time.
    """

    def __init__(
        self,
        upstream: Upstream,
        jobs: Sequence[Job],
        *,
        queue_timeout_s: float,
        total_timeout_s: float,
        max_running: int,
        max_buffered_chars: int,
    ) -> None:
        self._upstream = upstream
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._queue_timeout_s = queue_timeout_s
        self._total_timeout_s = total_timeout_s
        self._slots = asyncio.Semaphore(max_running)
        self._max_buffered_chars = max_buffered_chars
        self._tasks: list[asyncio.Task[None]] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._pending: dict[tuple[int, int], News] = {}
        self._num_pending_chars = 0
        self._num_running = len(jobs)
        self._failure: BaseException | None = None
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._counted_prompts: set[int] = set()
        self.stats = FeedStats(started_s=self._loop.time())

    async def __aenter__(self) -> Feed:
        self._timers = [
            self._loop.call_later(self._queue_timeout_s, self._queued_too_long),
            self._loop.call_later(self._total_timeout_s, self._took_too_long),
        ]
        self._tasks = [self._loop.create_task(self._pump(index, job)) for index, job in enumerate(self._jobs)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._timers:
            timer.cancel()
        running = [task for task in self._tasks if not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def fail(self, failure: BaseException) -> None:
        """Ends the request with an error; the first one counts."""
        if self._failure is None:
            self._failure = failure
        self._has_news.set()

    async def take(self) -> list[News]:
        """Waits for news and returns all there are; an empty list when every sequence has ended.

        Raises:
            GatewayError: the request failed; or whatever else `fail` was given.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if not self._num_running:
                return []
            self._has_news.clear()
            await self._has_news.wait()
        return self.take_now()

    def take_now(self) -> list[News]:
        """Returns the news there are, without waiting."""
        news = list(self._pending.values())
        self._pending.clear()
        self._num_pending_chars = 0
        self._has_room.set()
        return news

    async def _pump(self, index: int, job: Job) -> None:
        try:
            async with self._slots, self._upstream.open(job) as stream:
                async for chunk in stream:
                    if self.stats.first_news_s is None:
                        self.stats.replica = stream.replica
                    self._add(index, chunk)
                    if not self._has_room.is_set():
                        await self._has_room.wait()
        except ClientError as error:
            self.fail(_with_cause(from_client_error(error), error))
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self.fail(error)
        finally:
            self._num_running -= 1
            self._has_news.set()

    def _add(self, index: int, chunk: Chunk) -> None:
        key = (index, chunk.sequence_index)
        news = self._pending.get(key)
        if news is None:
            news = self._pending[key] = News(index, chunk.sequence_index)
        self._count(index, chunk)
        news.text += chunk.text
        news.num_tokens += chunk.num_output_tokens or 0
        if chunk.logprobs is not None:
            news.logprobs += chunk.logprobs
        if chunk.cumulative_logprob is not None:
            news.cumulative_logprob = chunk.cumulative_logprob
        if chunk.prompt_logprobs is not None:
            news.prompt_logprobs = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            news.finish_reason = chunk.finish_reason
        self._num_pending_chars += len(chunk.text)
        if self._num_pending_chars > self._max_buffered_chars:
            self._has_room.clear()
        self._has_news.set()

    def _count(self, index: int, chunk: Chunk) -> None:
        stats = self.stats
        now_s = self._loop.time()
        if stats.first_news_s is None:
            stats.first_news_s = now_s
            self._timers[0].cancel()
        stats.last_news_s = now_s
        stats.num_output_tokens += chunk.num_output_tokens or 0
        if index not in self._counted_prompts and chunk.num_input_tokens is not None:
            self._counted_prompts.add(index)
            stats.num_prompt_tokens += chunk.num_input_tokens
        if chunk.perf_metrics is not None and chunk.sequence_index == 0:
            self._note_metrics(chunk.perf_metrics)

    def _note_metrics(self, metrics: PerfMetrics) -> None:
        self.stats.num_cached_tokens += metrics.num_cached_tokens or 0
        if metrics.first_scheduled_time_ns and metrics.arrival_time_ns:
            waited_s = (metrics.first_scheduled_time_ns - metrics.arrival_time_ns) / 1e9
            self.stats.queue_s = max(0.0, waited_s, self.stats.queue_s or 0.0)

    def _queued_too_long(self) -> None:
        self.fail(
            Unavailable(
                f"no token within {self._queue_timeout_s:g} s: the server is overloaded; send the request again later",
                code="queue_timeout",
            )
        )

    def _took_too_long(self) -> None:
        self.fail(DeadlinePassed(f"the request was not finished within {self._total_timeout_s:g} s"))


def _with_cause(failure: GatewayError, cause: BaseException) -> GatewayError:
    """Keeps what really happened for the log."""
    failure.__cause__ = cause
    return failure
