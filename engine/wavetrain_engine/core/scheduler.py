# SPDX-License-Identifier: Apache-2.0
"""Who computes how many tokens in the next step.

There is no prefill phase and no decode phase: a request has `num_computed_tokens`, and a step gives it some
more, under one token budget. A chunked prompt, a cached prefix, a resumed request and a decoding one are all
the same row, a span of tokens to compute.

The scheduler is built for steps in flight: `schedule` may be called again before `update` has seen the
result of the step before. A row that samples leaves a placeholder (`num_pending_tokens`), and the next plan
computes that token without knowing it. So a stop is found one step late; the surplus row is then dropped.
Why giving blocks back under a step in flight is safe: the executor runs steps in order, whoever gets the
blocks writes them in a later step, and a block that can be found by its hash is never written again.

Order. Requests run in the order of (priority, arrival), strictly: none is admitted before one ahead of it,
and the last one running is the one preempted. So requests of one priority cannot starve, the first request
always makes progress (the whole pool is its own, if need be), and a worse priority waits for as long as
better ones keep coming: that is what priorities are for. Waiting requests do not preempt running ones.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from wavetrain_engine.config import SchedulerSection
from wavetrain_engine.core.block_pool import OutOfBlocks
from wavetrain_engine.core.kv_cache_manager import KVCacheManager
from wavetrain_engine.core.outputs import end_update, find_end, last_token_update
from wavetrain_engine.core.request_heap import RequestHeap
from wavetrain_engine.core.request_state import RequestState, RequestStatus
from wavetrain_engine.errors import ConfigError, RequestFailed, WavetrainError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest, StepPlan, StepResult
from wavetrain_engine.request import FinishReason, RequestUpdate, TokenLogprobs

_SORT_KEY = attrgetter("sort_key")
_RUNNING, _FINISHED = RequestStatus.RUNNING, RequestStatus.FINISHED
_NO_BLOCKS = ()


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan and the requests of its rows; rows name requests by id, and ids may be used again."""

    plan: StepPlan
    requests: list[RequestState]


@dataclass(slots=True)
class SchedulerCounters:
    """What the scheduler has done since the start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_cache_queried_tokens: int = 0
    num_prefix_cache_hit_tokens: int = 0


class Scheduler:
    """Plans steps and accounts for their results.

    Not thread-safe; `schedule` and `update` alternate as the caller likes, but results are given back in the
    order the steps were planned.

    Raises:
        ConfigError: the KV cache is too small for one request of max_model_len tokens.
    """

    def __init__(self, config: SchedulerSection, facts: EngineFacts, kv_cache: KVCacheManager) -> None:
        if facts.max_model_len > kv_cache.num_blocks * kv_cache.block_size:
            raise ConfigError(
                f"the KV cache has {kv_cache.num_blocks} blocks of {kv_cache.block_size} tokens, too few for one "
                f"request of max_model_len ({facts.max_model_len}) tokens; give it more memory or lower --max-model-len"
            )
        self.counters = SchedulerCounters()
        self._kv_cache = kv_cache
        self._block_size = kv_cache.block_size
        self._max_num_seqs = facts.max_num_seqs
        self._max_num_batched_tokens = facts.max_num_batched_tokens
        self._long_prefill_token_threshold = config.long_prefill_token_threshold or facts.max_num_batched_tokens
        self._is_out_of_blocks = False  # the last plan admitted fewer than it had seats for
        # Hysteresis: what is admitted into the last blocks is preempted a step later, for nothing.
        self._num_watermark_blocks = kv_cache.num_blocks // 100
        self._running: list[RequestState] = []  # sorted by sort_key
        self._last_seen_step_id = -1  # later ones are in flight
        self._waiting = RequestHeap(key=attrgetter("priority"))
        self._removed: list[str] = []

    @property
    def num_running(self) -> int:
        """Requests that hold a seat."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one, the preempted ones included."""
        return len(self._waiting)

    @property
    def num_free_seats(self) -> int:
        """Waiting requests that the next step may well admit, so that they do not count as queued."""
        return 0 if self._is_out_of_blocks else self._max_num_seqs - len(self._running)

    def add(self, request: RequestState) -> None:
        """Queues a request."""
        self._waiting.push(request)

    def end(self, request: RequestState, reason: FinishReason, error: WavetrainError | None) -> RequestUpdate:
        """Ends an unfinished request at once, wherever it is, and returns its last update."""
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        self._finish(request)
        return end_update(request, reason, error)

    def schedule(self, now_ns: int) -> ScheduledStep | None:
        """Plans the next step; None: nothing can be computed before the result of a step in flight is seen."""
        rows: list[ScheduledRequest] = []
        requests: list[RequestState] = []
        admitted: list[AdmittedRequest] = []
        budget, num_owed_blocks = self._schedule_running(rows, requests)
        self._schedule_waiting(rows, requests, admitted, budget, num_owed_blocks, now_ns)
        if not rows:
            return None
        plan = StepPlan(step_id=self.counters.num_steps, removed=self._removed, admitted=admitted, scheduled=rows)
        self._removed = []
        self.counters.num_steps += 1
        return ScheduledStep(plan, requests)

    def update(self, step: ScheduledStep, result: StepResult, now_ns: int, updates: list[RequestUpdate]) -> None:
        """Accounts for the result of the oldest step in flight and appends the news to `updates`.

        Raises:
            RuntimeError: the result does not fit the plan.
        """
        requests, sampled, logprobs, errors = step.requests, result.sampled_token_ids, result.logprobs, result.errors
        prompt_logprobs = result.prompt_logprobs
        for part in (sampled, logprobs or sampled, prompt_logprobs or sampled):
            if len(part) != len(requests):
                raise RuntimeError(f"step {step.plan.step_id}: {len(part)} results for {len(requests)} rows")
        self._last_seen_step_id = step.plan.step_id
        num_removed, num_updates = len(self._removed), len(updates)
        for index, row in enumerate(step.plan.scheduled):
            request = requests[index]
            if request.status is _FINISHED:  # the surplus row of one that ended meanwhile
                continue
            if errors and index in errors:
                self._finish(request, is_tainted=True)
                num_updates += 1  # no token
                updates.append(end_update(request, FinishReason.ERROR, RequestFailed(errors[index])))
                continue
            if prompt_logprobs and request.prompt_logprobs is not None:
                # After a preemption the prompt is computed again: what was seen before is not taken twice.
                num_seen = len(request.prompt_logprobs) - row.num_computed_tokens
                request.prompt_logprobs += (prompt_logprobs[index] or [])[num_seen:]
            if row.is_sampling:
                entries = logprobs[index] if logprobs else None
                updates.append(self._append_token(request, sampled[index], entries, now_ns))
        self.counters.num_output_tokens += len(updates) - num_updates
        if len(self._removed) != num_removed:  # somebody who ran has ended
            self._running = [request for request in self._running if request.status is _RUNNING]

    def check(self) -> None:
        """Verifies that no block leaked and nobody runs twice or out of order.

        Raises:
            RuntimeError: an invariant is broken.
        """
        self._kv_cache.check(self._running)
        keys = [request.sort_key for request in self._running]
        if any(first >= second for first, second in pairwise(keys)):
            raise RuntimeError("running requests are out of order")
        if any(request.block_ids or request.status is not RequestStatus.WAITING for request in self._waiting):
            raise RuntimeError("a waiting request holds blocks, or does not know that it waits")

    def _schedule_running(self, rows: list[ScheduledRequest], requests: list[RequestState]) -> tuple[int, int]:
        """Plans rows for who runs; returns the budget left and the blocks that unfinished prompts will need."""
        running, budget, num_owed_blocks = self._running, self._max_num_batched_tokens, 0
        step_id = self.counters.num_steps
        for index, request in enumerate(running, 1):  # preemption shortens the list from its end
            if budget <= 0:
                break
            num_new = num_uncomputed = request.num_planned_tokens - request.num_computed_tokens
            if request.num_planned_tokens >= request.max_num_tokens:
                continue  # the placeholder of its last token, which needs no KV
            if num_new > 1:  # a chunk leaves one token for each request behind it: nobody's output stalls
                num_new = min(num_new, self._long_prefill_token_threshold, max(1, budget - len(running) + index))
            num_tokens = request.num_computed_tokens + num_new
            new_block_ids: Sequence[int] = _NO_BLOCKS
            if num_tokens > request.num_slots:
                grown = self._grow(request, num_tokens)
                if grown is None:
                    break
                new_block_ids = grown
            rows.append(_plan_row(request, step_id, num_new, new_block_ids))
            requests.append(request)
            budget -= num_new
            if num_new < num_uncomputed:
                num_owed_blocks += self._kv_cache.num_blocks_for(request.num_tokens) - len(request.block_ids)
        return budget, num_owed_blocks

    def _grow(self, request: RequestState, num_tokens: int) -> list[int] | None:
        """Makes room, preempting from the end of the order; None: the request itself had to go."""
        while True:
            try:
                return self._kv_cache.grow(request, num_tokens)
            except OutOfBlocks:  # noqa: PERF203
                victim = self._running.pop()
                self._preempt(victim)
                if victim is request:
                    return None

    def _preempt(self, request: RequestState) -> None:
        """Takes the blocks of a request that was just taken off the running ones, and queues it again.

        A token it has in flight is still seen by `update`; until then it is not admitted again.
        """
        self._kv_cache.release(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._is_out_of_blocks = True
        self._removed.append(request.request_id)
        self._waiting.push(request)

    def _schedule_waiting(
        self,
        rows: list[ScheduledRequest],
        requests: list[RequestState],
        admitted: list[AdmittedRequest],
        budget: int,
        num_owed_blocks: int,
        now_ns: int,
    ) -> None:
        """Admits in strict order while there are budget, seats and blocks."""
        self._is_out_of_blocks = False
        while budget > 0 and len(self._running) < self._max_num_seqs:
            request = self._waiting.peek()
            if request is None or request.last_step_id > self._last_seen_step_id:
                break
            prefix = self._kv_cache.find_prefix(request)
            num_cached_tokens = len(prefix) * self._kv_cache.block_size
            num_uncomputed = request.num_tokens - num_cached_tokens
            num_new = min(num_uncomputed, budget, self._long_prefill_token_threshold)
            num_spare_blocks = num_owed_blocks + self._num_watermark_blocks if self._running else 0
            try:
                self._kv_cache.admit(request, prefix, num_cached_tokens + num_new, num_spare_blocks=num_spare_blocks)
            except OutOfBlocks:
                self._is_out_of_blocks = True
                break
            self._admit(request, num_cached_tokens, now_ns)
            admitted.append(
                AdmittedRequest(
                    request_id=request.request_id,
                    token_ids=request.token_ids.copy(),
                    num_prompt_tokens=request.num_prompt_tokens,
                    sampling_params=request.sampling_params,
                    block_ids=request.block_ids.copy(),
                    num_computed_tokens=num_cached_tokens,
                )
            )
            rows.append(_plan_row(request, self.counters.num_steps, num_new, _NO_BLOCKS))
            requests.append(request)
            budget -= num_new
            num_owed_blocks += self._kv_cache.num_blocks_for(request.num_tokens) - len(request.block_ids)

    def _admit(self, request: RequestState, num_cached_tokens: int, now_ns: int) -> None:
        self._waiting.discard(request)
        request.status = RequestStatus.RUNNING
        insort(self._running, request, key=_SORT_KEY)
        if request.num_preemptions:
            return
        request.first_scheduled_time_ns = now_ns
        request.num_cached_tokens = num_cached_tokens
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        if self._kv_cache.may_read_cache(request):
            self.counters.num_prefix_cache_queried_tokens += request.num_prompt_tokens
            self.counters.num_prefix_cache_hit_tokens += num_cached_tokens

    def _append_token(
        self, request: RequestState, token_ids: list[int], logprobs: list[TokenLogprobs] | None, now_ns: int
    ) -> RequestUpdate:
        """Turns the oldest placeholder into its token, and ends the request if that was the last one."""
        if len(token_ids) != 1:
            raise RuntimeError(f"request {request.request_id}: {len(token_ids)} tokens were sampled instead of one")
        # Only now is the KV of the tokens before it certain: logits that saw all of it were finite.
        num_certain, token_id = request.num_tokens, token_ids[0]
        num_uncommitted = num_certain - request.num_committed_blocks * self._block_size
        if num_uncommitted >= self._block_size and request.status is _RUNNING:
            self._kv_cache.commit(request, num_certain)
        request.token_ids.append(token_id)
        request.num_tokens = num_tokens = num_certain + 1
        request.last_token_time_ns = now_ns
        if not request.first_token_time_ns:
            request.first_token_time_ns = now_ns
        prompt_logprobs = request.prompt_logprobs
        request.prompt_logprobs = None
        if token_id in request.end_token_ids or num_tokens >= request.max_num_tokens:  # most are neither
            reason = find_end(request, token_id)
            if reason is not None:
                self._finish(request)
                return last_token_update(request, token_ids, reason, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        return RequestUpdate(
            request_id=request.request_id,
            new_token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _finish(self, request: RequestState, *, is_tainted: bool = False) -> None:
        """Gives back what an unfinished request holds, but its seat, which the caller sweeps."""
        if request.status is RequestStatus.RUNNING:
            self._kv_cache.release(request, is_tainted=is_tainted)
            self._removed.append(request.request_id)
        else:
            self._waiting.discard(request)
        request.status = RequestStatus.FINISHED


def _plan_row(request: RequestState, step_id: int, num_new: int, new_block_ids: Sequence[int]) -> ScheduledRequest:
    """Makes the row and moves the request's counters on, as if the step were done."""
    start = request.num_computed_tokens
    request.num_computed_tokens = end = start + num_new
    request.last_step_id = step_id
    is_sampling = end == request.num_planned_tokens
    if is_sampling:
        request.num_planned_tokens += 1
    return ScheduledRequest(request.request_id, start, num_new, new_block_ids, is_sampling)
