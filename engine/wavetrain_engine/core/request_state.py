# SPDX-License-Identifier: Apache-2.0
"""What the core knows of one unfinished request.

The counters, and how they relate (P = prompt, O = output tokens seen, p = tokens sampled but not seen):

    num_tokens                = P + O, the length of token_ids
    num_planned_tokens        = num_tokens + p, where p > 0 only while a step is in flight
    num_computed_tokens      <= num_planned_tokens: tokens whose KV is in the cache once the steps in flight are done
    num_slots                 = blocks held * block_size >= num_computed_tokens
    num_committed_blocks      blocks at the front of the table that were offered to the prefix cache
"""

from __future__ import annotations

from collections.abc import Set
from enum import Enum

from wavetrain_engine.request import EngineRequest, TokenLogprobs
from wavetrain_engine.sampling_params import SamplingParams


class RequestStatus(Enum):
    """Where a request is. A preempted request waits again."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class RequestState:
    """Mutable state of one request; compared by identity, so a reused request_id cannot confuse two.

    Attributes:
        index: order of arrival, unique in the core.
        token_ids: prompt and the output tokens seen; append-only.
        max_num_tokens: prompt and output tokens at most.
        min_num_tokens: prompt and output tokens before which no end token counts.
        eos_token_ids: none where EOS is ignored.
        end_token_ids: EOS and stop tokens.
        last_step_id: the latest step with a row of this request; -1: none yet.
        num_reused_blocks_now: blocks at the front of the table that came from the prefix cache.
        prompt_logprobs: collected so far; None where not asked for, or delivered.
    """

    __slots__ = (
        "arrival_time_ns",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "deadline_s",
        "end_token_ids",
        "eos_token_ids",
        "first_scheduled_time_ns",
        "first_token_time_ns",
        "index",
        "last_step_id",
        "last_token_time_ns",
        "max_num_tokens",
        "min_num_tokens",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_new_blocks",
        "num_planned_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_reused_blocks",
        "num_reused_blocks_now",
        "num_slots",
        "num_tokens",
        "priority",
        "prompt_logprobs",
        "request_id",
        "sampling_params",
        "status",
        "token_ids",
        "traceparent",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        sampling_params: SamplingParams,
        token_ids: list[int],
        index: int,
        max_num_tokens: int,
        eos_token_ids: Set[int],
        arrival_time_ns: int,
    ) -> None:
        self.request_id = request.request_id
        self.priority = request.priority
        self.deadline_s = request.deadline_s
        self.cache_salt = request.cache_salt
        self.traceparent = request.traceparent
        self.index = index
        self.sampling_params = sampling_params
        self.status = RequestStatus.WAITING

        self.token_ids = token_ids
        self.num_tokens = self.num_prompt_tokens = len(token_ids)
        self.max_num_tokens = max_num_tokens
        self.min_num_tokens = self.num_prompt_tokens + sampling_params.min_tokens
        self.eos_token_ids = frozenset[int]() if sampling_params.ignore_eos else frozenset(eos_token_ids)
        self.end_token_ids = self.eos_token_ids.union(sampling_params.stop_token_ids)
        self.prompt_logprobs: list[TokenLogprobs] | None = None if sampling_params.prompt_logprobs is None else []

        self.num_computed_tokens = 0
        self.num_planned_tokens = self.num_tokens
        self.last_step_id = -1

        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_slots = 0
        self.num_committed_blocks = 0
        self.num_reused_blocks_now = 0

        self.arrival_time_ns = arrival_time_ns
        self.first_scheduled_time_ns = 0
        self.first_token_time_ns = 0
        self.last_token_time_ns = 0
        self.num_cached_tokens = 0
        self.num_new_blocks = 0
        self.num_reused_blocks = 0
        self.num_preemptions = 0

    @property
    def sort_key(self) -> tuple[int, int]:
        """Who runs first and is preempted last: the lower key."""
        return (self.priority, self.index)
