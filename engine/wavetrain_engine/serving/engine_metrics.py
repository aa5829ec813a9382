# SPDX-License-Identifier: Apache-2.0
"""The engine's numbers on the Triton server's metrics page, in two dialects.

    wavetrain_*      vLLM's names under our prefix: gauges of now, counters since the server started
    nv_trt_llm_*     what dashboards of tensorrtllm_backend read, and the Kubernetes gateway-API inference extension:
                     waiting and scheduled requests, the KV cache's use; all gauges

Setting a metric is a round trip to the server (60 to 100 µs, measured), so numbers are read once an interval, whatever
the engine does meanwhile, and only those that changed are set.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import EngineDead
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.request import FinishReason
from wavetrain_engine.stats import EngineStats

_LOGGER = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_GAUGE, _COUNTER = "gauge", "counter"
# The model that tensorrtllm_backend's readers look for.
_LEGACY_LABELS = {"model": "tensorrt_llm", "version": "1"}


class Sample(NamedTuple):
    """One number under its name and labels."""

    name: str
    labels: Mapping[str, str]
    value: float


_FAMILIES = {
    "wavetrain_num_requests_running": (_GAUGE, "Requests that take part in steps"),
    "wavetrain_num_requests_waiting": (_GAUGE, "Requests that were accepted and wait for room"),
    "wavetrain_kv_cache_usage_perc": (_GAUGE, "Share of the KV cache's blocks that requests hold, 0 to 1"),
    "wavetrain_cache_config_info": (_GAUGE, "What the KV cache is made of, as labels"),
    "wavetrain_prompt_tokens_total": (_COUNTER, "Prompt tokens of requests that were admitted"),
    "wavetrain_generation_tokens_total": (_COUNTER, "Output tokens"),
    "wavetrain_request_success_total": (_COUNTER, "Requests that ended, by their finish reason"),
    "wavetrain_num_preemptions_total": (_COUNTER, "Times that a request gave up its blocks to another"),
    "wavetrain_prefix_cache_queries_total": (_COUNTER, "Prompt tokens that the prefix cache was asked for"),
    "wavetrain_prefix_cache_hits_total": (_COUNTER, "Prompt tokens that it had"),
    "wavetrain_steps_total": (_COUNTER, "Steps of the engine"),
    "nv_trt_llm_request_metrics": (_GAUGE, "Requests by what becomes of them"),
    "nv_trt_llm_kv_cache_block_metrics": (_GAUGE, "KV-cache blocks"),
    "nv_trt_llm_general_metrics": (_GAUGE, "Steps of the engine"),
}


def samples(stats: EngineStats, facts: EngineFacts, *, model: str) -> Iterator[Sample]:
    """Yields every number there is, each under a name of its own."""
    labels = {"model": model}
    usage = stats.num_blocks_used / max(1, stats.num_blocks_total)
    for name, value in (
        ("wavetrain_num_requests_running", stats.num_running),
        ("wavetrain_num_requests_waiting", stats.num_waiting),
        ("wavetrain_kv_cache_usage_perc", usage),
        ("wavetrain_prompt_tokens_total", stats.num_prompt_tokens),
        ("wavetrain_generation_tokens_total", stats.num_output_tokens),
        ("wavetrain_num_preemptions_total", stats.num_preemptions),
        ("wavetrain_prefix_cache_queries_total", stats.num_prefix_cache_queried_tokens),
        ("wavetrain_prefix_cache_hits_total", stats.num_prefix_cache_hit_tokens),
        ("wavetrain_steps_total", stats.num_steps),
    ):
        yield Sample(name, labels, value)
    for reason in FinishReason:
        number = stats.num_requests_finished.get(reason, 0)
        yield Sample("wavetrain_request_success_total", {**labels, "finished_reason": reason.value}, number)
    made_of = {"block_size": str(facts.block_size), "num_blocks": str(facts.num_blocks)}
    yield Sample("wavetrain_cache_config_info", {**labels, **made_of, "cache_dtype": facts.kv_cache_dtype}, 1)
    yield from _legacy_samples(stats, facts, usage)


def _legacy_samples(stats: EngineStats, facts: EngineFacts, usage: float) -> Iterator[Sample]:
    requests = {
        "waiting": stats.num_waiting,
        "scheduled": stats.num_running,
        "active": stats.num_running + stats.num_waiting,
        "max": facts.max_num_seqs,
    }
    for kind, number in requests.items():
        yield Sample("nv_trt_llm_request_metrics", {"request_type": kind, **_LEGACY_LABELS}, number)
    blocks = {
        # Rounded: the server's reader of this family for load balancers takes no exponents.
        "fraction": round(usage, 4),
        "tokens_per": facts.block_size,
        "used": stats.num_blocks_used,
        "free": stats.num_blocks_total - stats.num_blocks_used,
        "max": stats.num_blocks_total,
        "reused": stats.num_prefix_cache_hit_tokens // facts.block_size,
    }
    for kind, number in blocks.items():
        yield Sample("nv_trt_llm_kv_cache_block_metrics", {"kv_cache_block_type": kind, **_LEGACY_LABELS}, number)
    yield Sample("nv_trt_llm_general_metrics", {"general_type": "iteration_counter", **_LEGACY_LABELS}, stats.num_steps)


class EngineMetrics:
    """Publishes a core's numbers until it is closed.

    Args:
        read_stats: asks the core; raises EngineDead or a TimeoutError of futures where it does not answer.
        model: the label of the numbers, a Triton model's name.
    """

    def __init__(
        self,
        read_stats: Callable[[], EngineStats],
        facts: EngineFacts,
        *,
        model: str,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        self._read_stats = read_stats
        self._facts = facts
        self._model = model
        self._interval_s = interval_s
        self._families = {
            name: pb_utils.MetricFamily(
                name=name,
                description=description,
                kind=pb_utils.MetricFamily.COUNTER if kind == _COUNTER else pb_utils.MetricFamily.GAUGE,
            )
            for name, (kind, description) in _FAMILIES.items()
        }
        self._metrics: dict[tuple[str, frozenset[tuple[str, str]]], Any] = {}
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._closing = threading.Event()
        self._publish(EngineStats(num_blocks_total=facts.num_blocks))
        self._thread = threading.Thread(target=self._run, name="engine-metrics", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Stops publishing. Idempotent."""
        self._closing.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._closing.wait(self._interval_s):
                stats = self._ask()
                if stats is not None:
                    self._publish(stats)
        except Exception:
            _LOGGER.exception("the engine's metrics are no longer published")

    def _ask(self) -> EngineStats | None:
        try:
            return self._read_stats()
        except (EngineDead, concurrent.futures.TimeoutError):
            return None  # it restarts, or is in a long step; the numbers stay until it answers

    def _publish(self, stats: EngineStats) -> None:
        for name, labels, value in samples(stats, self._facts, model=self._model):
            key = name, frozenset(labels.items())
            if key not in self._metrics:
                self._metrics[key] = self._families[name].Metric(labels=dict(labels))
                self._values[key] = 0
            self._move(key, value, is_counter=_FAMILIES[name][0] == _COUNTER)

    def _move(self, key: tuple[str, frozenset[tuple[str, str]]], value: float, *, is_counter: bool) -> None:
        last, self._values[key] = self._values[key], value
        if value == last:
            return
        if is_counter:
            # A core that was started anew counts from 0; what its forerunner counted stays.
            self._metrics[key].increment(value - last if value > last else value)
        else:
            self._metrics[key].set(value)
