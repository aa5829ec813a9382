# SPDX-License-Identifier: Apache-2.0
"""The outputs that `engine`, `ensemble` and `llm` share: probabilities, indices, timing, KV cache, counts.

They are sent only when they were asked for; batch and sequence index only where there is more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from wavetrain_engine.request import RequestStats
from wavetrain_engine.serving.live_request import LiveSequence, Unsent
from wavetrain_engine.serving.tensors import tensor


def usage_outputs(
    sequence: LiveSequence, unsent: Unsent, sequences: Sequence[LiveSequence], *, has_batch_dimension: bool
) -> list[Any]:
    """Returns the legacy contract's tensors beside text and ids, for one sequence's response."""
    make = partial(tensor, has_batch_dimension=has_batch_dimension)
    options = sequence.options
    outputs: list[Any] = []
    if len(sequences) > 1:
        outputs += [
            make("batch_index", [sequence.row], np.int32),
            make("sequence_index", [sequence.sequence_index], np.int32),
        ]
    if options.return_log_probs:
        chosen = [entry.logprobs[0] for entry in unsent.logprobs]
        outputs += [
            make("cum_log_probs", [sequence.cumulative_logprob], np.float32),
            make("output_log_probs", [chosen], np.float32),
        ]
    if options.return_perf_metrics and sequence.is_finished and sequence.stats is not None:
        outputs += _perf_outputs(sequence.stats, make)
    return outputs


def _perf_outputs(stats: RequestStats, make: Any) -> list[Any]:
    integers = {
        "kv_cache_alloc_new_blocks": stats.num_new_blocks,
        "kv_cache_reused_blocks": stats.num_reused_blocks,
        "kv_cache_alloc_total_blocks": stats.num_new_blocks + stats.num_reused_blocks,
        # There is no speculation yet, so these are what they are.
        "total_accepted_draft_tokens": 0,
        "total_draft_tokens": 0,
    }
    times = {
        "arrival_time_ns": stats.arrival_time_ns,
        "first_scheduled_time_ns": stats.first_scheduled_time_ns,
        "first_token_time_ns": stats.first_token_time_ns,
        "last_token_time_ns": stats.last_token_time_ns,
    }
    return [
        *(make(name, [value], np.int32) for name, value in integers.items()),
        *(make(name, [value], np.int64) for name, value in times.items()),
        make("acceptance_rate", [0.0], np.float32),
    ]
