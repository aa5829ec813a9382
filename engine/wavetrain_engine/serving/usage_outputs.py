# SPDX-License-Identifier: Apache-2.0
"""The outputs that `engine`, `ensemble` and `llm` share: probabilities, indices, timing, KV cache, counts.

A response is about one sequence while streaming, else about all sequences of all rows: `[rows][sequences]`, each row
with as many. What is known per sequence has an element for each; what the contract has once per row is about the
row's sequences together. All are sent only when they were asked for, the indices where there is more than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from wavetrain_engine.request import RequestStats
from wavetrain_engine.serving.live_request import LiveSequence, Unsent
from wavetrain_engine.serving.tensors import padded, tensor

# Beyond the end of a shorter sequence; so that the sum is still the cumulative one.
_NO_LOGPROB = 0.0


class News(NamedTuple):
    """What a response says of one sequence."""

    sequence: LiveSequence
    unsent: Unsent


def usage_outputs(rows: Sequence[Sequence[News]], *, has_batch_dimension: bool) -> list[Any]:
    """Returns the legacy contract's tensors beside text and ids, for one response."""
    options = rows[0][0].sequence.options
    if not options.return_log_probs and not options.return_perf_metrics:
        return []
    make = partial(tensor, has_batch_dimension=has_batch_dimension)
    every = [news.sequence for row in rows for news in row]
    outputs: list[Any] = []
    if options.return_log_probs:
        chosen = [[[entry.logprobs[0] for entry in news.unsent.logprobs] for news in row] for row in rows]
        outputs += [
            make("cum_log_probs", [[news.sequence.cumulative_logprob for news in row] for row in rows], np.float32),
            make("output_log_probs", padded(chosen, [_NO_LOGPROB] * len(rows)), np.float32),
        ]
    if options.return_perf_metrics and all(sequence.is_finished for sequence in every):
        stats = [[news.sequence.stats for news in row if news.sequence.stats is not None] for row in rows]
        if all(stats):
            outputs += _perf_outputs([_joined(row) for row in stats], make)
    return outputs


def index_outputs(sequence: LiveSequence, *, has_batch_dimension: bool) -> list[Any]:
    """Returns the tensors that tell which sequence a streamed response is about."""
    make = partial(tensor, has_batch_dimension=has_batch_dimension)
    return [
        make("batch_index", [[sequence.row]], np.int32),
        make("sequence_index", [[sequence.sequence_index]], np.int32),
    ]


def _joined(stats: Sequence[RequestStats]) -> RequestStats:
    """What the sequences of a row cost together; 0 is a time that never was."""
    return RequestStats(
        arrival_time_ns=_first(item.arrival_time_ns for item in stats),
        first_scheduled_time_ns=_first(item.first_scheduled_time_ns for item in stats),
        first_token_time_ns=_first(item.first_token_time_ns for item in stats),
        last_token_time_ns=max(item.last_token_time_ns for item in stats),
        num_new_blocks=sum(item.num_new_blocks for item in stats),
        num_reused_blocks=sum(item.num_reused_blocks for item in stats),
    )


def _first(times_ns: Iterable[int]) -> int:
    return min((time_ns for time_ns in times_ns if time_ns), default=0)


def _perf_outputs(rows: Sequence[RequestStats], make: Any) -> list[Any]:
    integers = {
        "kv_cache_alloc_new_blocks": [stats.num_new_blocks for stats in rows],
        "kv_cache_reused_blocks": [stats.num_reused_blocks for stats in rows],
        "kv_cache_alloc_total_blocks": [stats.num_new_blocks + stats.num_reused_blocks for stats in rows],
        # There is no speculation yet, so these are what they are.
        "total_accepted_draft_tokens": [0] * len(rows),
        "total_draft_tokens": [0] * len(rows),
    }
    times = {
        "arrival_time_ns": [stats.arrival_time_ns for stats in rows],
        "first_scheduled_time_ns": [stats.first_scheduled_time_ns for stats in rows],
        "first_token_time_ns": [stats.first_token_time_ns for stats in rows],
        "last_token_time_ns": [stats.last_token_time_ns for stats in rows],
    }
    return [
        *(make(name, [[value] for value in values], np.int32) for name, values in integers.items()),
        *(make(name, [[value] for value in values], np.int64) for name, values in times.items()),
        make("acceptance_rate", [[0.0]] * len(rows), np.float32),
    ]
