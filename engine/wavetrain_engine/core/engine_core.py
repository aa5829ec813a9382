# SPDX-License-Identifier: Apache-2.0
"""The heart: requests in, one step after another, news out. It owns no device and no thread.

Invariants:
    1. every accepted request ends with exactly one update that has a finish reason, whatever happens
    2. at most `depth + 1` steps are submitted and not collected; the depth is 1 where steps are planned ahead, else 0
    3. nothing here runs between two calls: deadlines are looked at in `step`
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.admission import check_prompt, check_sampling_params, max_num_tokens
from wavetrain_engine.core.kv_cache_manager import KVCacheManager
from wavetrain_engine.core.outputs import end_update
from wavetrain_engine.core.request_heap import RequestHeap
from wavetrain_engine.core.request_state import RequestState
from wavetrain_engine.core.scheduler import ScheduledStep, Scheduler
from wavetrain_engine.errors import DeadlineExceeded, QueueFull, RequestError, WavetrainError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.plan import Executor, PendingResult
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.stats import EngineStats


class EngineCore:
    """Runs requests on an executor, many at a time. Not thread-safe: one thread calls everything.

    Args:
        facts: sizes of the cache and of a step; they hold even where `config` says otherwise.
        executor: not shut down by the core; whoever made it does that.
        on_end: told of each accepted request's end: its traceparent and its last update. Called between steps; must be
            quick and must not raise.
        monotonic_s: the clock of deadlines.
        time_ns: the clock of RequestStats.

    Raises:
        ConfigError: the KV cache cannot hold one request of max_model_len tokens.
    """

    def __init__(
        self,
        config: EngineConfig,
        facts: EngineFacts,
        executor: Executor,
        *,
        on_end: Callable[[str, RequestUpdate], None] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._facts = facts
        self._executor = executor
        self._on_end = on_end
        self._monotonic_s = monotonic_s
        self._time_ns = time_ns
        self._max_queue_size = config.scheduler.max_queue_size
        self._depth = 1 if config.scheduler.plans_ahead(facts.device) else 0
        self._eos_token_ids = frozenset(facts.generation.eos_token_ids)
        self._kv_cache = KVCacheManager(
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            is_caching=config.cache.enable_prefix_caching,
        )
        self._scheduler = Scheduler(config.scheduler, facts, self._kv_cache)
        self._unfinished: dict[str, RequestState] = {}
        self._deadlines = RequestHeap(key=attrgetter("deadline_s"))
        self._in_flight: deque[tuple[ScheduledStep, PendingResult]] = deque()
        self._updates: list[RequestUpdate] = []
        self._num_accepted = 0
        self._num_finished: Counter[FinishReason] = Counter()
        self._end_error: WavetrainError | None = None

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do or to tell. Deadlines belong to unfinished requests, so an
        engine without work may sleep for as long as nobody adds any."""
        return bool(self._unfinished or self._in_flight or self._updates)

    def add_request(self, request: EngineRequest) -> None:
        """Accepts a request; `step` tells the rest.

        Raises:
            RequestError: an empty prompt, token ids beyond the vocabulary, or a request_id that is in use.
            PromptTooLong: no room for an output token.
            InvalidSamplingParams: what only the loaded model shows to be wrong.
            QueueFull: as many requests wait as may.
            WavetrainError: what `end_all` was called with.
        """
        if self._end_error is not None:
            raise self._end_error
        if request.request_id in self._unfinished:
            raise RequestError(f"request_id {request.request_id!r} is in use by an unfinished request; choose another")
        token_ids = check_prompt(request, self._facts)
        sampling_params = check_sampling_params(request.sampling_params, self._facts)
        num_queued = self._scheduler.num_waiting - self._scheduler.num_free_seats
        if num_queued >= self._max_queue_size:
            raise QueueFull(f"{max(num_queued, 0)} requests wait, as many as --max-queue-size allows; try again later")
        state = RequestState(
            request,
            sampling_params=sampling_params,
            token_ids=token_ids,
            index=self._num_accepted,
            max_num_tokens=max_num_tokens(sampling_params, len(token_ids), self._facts),
            eos_token_ids=self._eos_token_ids,
            arrival_time_ns=request.arrival_time_ns or self._time_ns(),
        )
        self._num_accepted += 1
        self._unfinished[state.request_id] = state
        if state.deadline_s is not None:
            self._deadlines.push(state)
        self._scheduler.add(state)

    def cancel(self, request_id: str, error: WavetrainError | None = None) -> None:
        """Ends a request at once, waiting or running; its blocks are free when this returns.

        The update with finish reason `cancelled`, and the error's code and message if there is one, comes with
        the next `step`. An unknown or finished id is no error: an end may cross a cancel.
        """
        request = self._unfinished.get(request_id)
        if request is not None:
            self._emit_end(self._scheduler.end(request, FinishReason.CANCELLED, error))

    def step(self) -> list[RequestUpdate]:
        """Keeps the executor busy, collects its oldest step, and returns what changed for callers.

        Blocks for as long as that step runs, and not at all where nothing is in flight. After it raised, only
        `end_all` is of use.

        Raises:
            Exception: whatever the executor raised.
        """
        self._end_overdue()
        while len(self._in_flight) <= self._depth:
            step = self._scheduler.schedule(self._time_ns())
            if step is None:
                break
            self._in_flight.append((step, self._executor.submit(step.plan)))
        if self._in_flight:
            step, pending = self._in_flight.popleft()
            result = pending.result()
            num_told = len(self._updates)
            try:
                self._scheduler.update(step, result, self._time_ns(), self._updates)
            finally:
                for update in [news for news in self._updates[num_told:] if news.finish_reason is not None]:
                    self._account_end(update)
        updates, self._updates = self._updates, []
        return updates

    def end_all(self, error: WavetrainError) -> list[RequestUpdate]:
        """Ends every unfinished request with `error`; every later `add_request` raises it.

        Returns:
            The updates not returned by `step` yet, these ends among them. Steps in flight are forgotten, not
            waited for, and blocks stay where they are: the core may be in any state, and is of no further use.
        """
        self._end_error = error
        self._in_flight.clear()
        for request in list(self._unfinished.values()):
            self._emit_end(end_update(request, FinishReason.ERROR, error))
        updates, self._updates = self._updates, []
        return updates

    def stats(self) -> EngineStats:
        """Takes a snapshot."""
        counters = self._scheduler.counters
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks_total=self._kv_cache.num_blocks,
            num_blocks_used=self._kv_cache.num_used_blocks,
            num_blocks_cached=self._kv_cache.num_cached_blocks,
            num_requests_accepted=self._num_accepted,
            num_requests_finished=dict(self._num_finished),
            num_prompt_tokens=counters.num_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            num_preemptions=counters.num_preemptions,
            num_prefix_cache_queried_tokens=counters.num_prefix_cache_queried_tokens,
            num_prefix_cache_hit_tokens=counters.num_prefix_cache_hit_tokens,
            num_steps=counters.num_steps,
        )

    def check(self) -> None:
        """Verifies the core's invariants; O(blocks), so for tests and idle moments.

        Raises:
            RuntimeError: one is broken; the message says which.
        """
        self._scheduler.check()
        num_known = self._scheduler.num_running + self._scheduler.num_waiting
        if num_known != len(self._unfinished):
            raise RuntimeError(f"{len(self._unfinished)} requests are unfinished, {num_known} run or wait")
        num_finished = self._num_finished.total()
        if self._num_accepted != num_finished + len(self._unfinished):
            raise RuntimeError(f"{self._num_accepted} requests were accepted, {num_finished} have ended")

    def _end_overdue(self) -> None:
        request = self._deadlines.peek()
        if request is None:
            return
        now_s = self._monotonic_s()
        while request is not None and request.deadline_s is not None and request.deadline_s <= now_s:
            num_output_tokens = request.num_tokens - request.num_prompt_tokens
            self.cancel(
                request.request_id,
                DeadlineExceeded(f"the request's deadline passed after {num_output_tokens} output tokens"),
            )
            request = self._deadlines.peek()

    def _emit_end(self, update: RequestUpdate) -> None:
        self._updates.append(update)
        self._account_end(update)

    def _account_end(self, update: RequestUpdate) -> None:
        request = self._unfinished.pop(update.request_id)
        self._deadlines.discard(request)
        if update.finish_reason is not None:
            self._num_finished[update.finish_reason] += 1
        if self._on_end is not None:
            self._on_end(request.traceparent, update)
