# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the engine core, for metrics and logs: gauges of now, counters since the start."""

from __future__ import annotations

import msgspec

from wavetrain_engine.request import FinishReason


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What the core looks like between two steps.

    Counters only ever grow. They balance: `num_requests_accepted` equals the sum over
    `num_requests_finished` plus `num_running` plus `num_waiting`.

    Attributes:
        num_waiting: accepted and not running, preempted ones included.
        num_blocks_used: held by running requests.
        num_blocks_cached: findable in the prefix cache, whether held or free.
        num_prompt_tokens: of requests that were admitted at least once.
        num_prefix_cache_queried_tokens, num_prefix_cache_hit_tokens: prompt tokens looked up at the first
            admission, and those found; requests that may not read the cache do not count.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_total: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_requests_accepted: int = 0
    num_requests_finished: dict[FinishReason, int] = {}
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_cache_queried_tokens: int = 0
    num_prefix_cache_hit_tokens: int = 0
    num_steps: int = 0
