# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the gateway. Labels come from what is configured, never from what a caller sends."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wavetrain_gateway.exchange import Exchange, Record
from wavetrain_gateway.feed import FeedStats

_FAST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WHOLE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LABELS = ("model", "replica", "key")


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "wavetrain_gateway"
        self._requests = Counter(
            f"{prefix}_requests", "Requests answered", ("route", "status", "error"), registry=self.registry
        )
        self._finished = Counter(
            f"{prefix}_finished_sequences", "Sequences by how they ended", ("model", "reason"), registry=self.registry
        )
        self._prompt_tokens = Counter(f"{prefix}_prompt_tokens", "Prompt tokens", _LABELS, registry=self.registry)
        self._cached_tokens = Counter(
            f"{prefix}_cached_prompt_tokens", "Prompt tokens from the prefix cache", _LABELS, registry=self.registry
        )
        self._output_tokens = Counter(f"{prefix}_generation_tokens", "Output tokens", _LABELS, registry=self.registry)
        self._ttft = Histogram(
            f"{prefix}_time_to_first_token_seconds",
            "From the request to its first token",
            _LABELS,
            registry=self.registry,
            buckets=_FAST_S,
        )
        self._itl = Histogram(
            f"{prefix}_inter_token_latency_seconds",
            "Mean time between a request's output tokens",
            _LABELS,
            registry=self.registry,
            buckets=_TOKEN_S,
        )
        self._e2e = Histogram(
            f"{prefix}_e2e_request_latency_seconds",
            "From a generation request to its last token",
            _LABELS,
            registry=self.registry,
            buckets=_WHOLE_S,
        )
        self._queue = Histogram(
            f"{prefix}_request_queue_time_seconds",
            "Time in the engine's queue",
            _LABELS,
            registry=self.registry,
            buckets=_FAST_S,
        )
        self._limited = Counter(
            f"{prefix}_rate_limited", "Requests refused by a limit", ("key", "code"), registry=self.registry
        )
        self._cache = Counter(f"{prefix}_response_cache", "Response cache lookups", ("result",), registry=self.registry)
        self.active = Gauge(f"{prefix}_active_requests", "Requests being worked on", registry=self.registry)
        self.sockets = Gauge(f"{prefix}_websockets", "Open WebSockets", registry=self.registry)

    def count(self, exchange: Exchange) -> None:
        """Counts a request that has ended."""
        record = exchange.record
        self._requests.labels(record.route, str(record.status), record.error_code).inc()
        if record.status == 429:
            self._limited.labels(exchange.caller.name, record.error_code).inc()
        for reason in record.finish_reasons:
            self._finished.labels(record.model, reason).inc()
        if record.stats is not None:
            self._count_tokens(record, record.stats, exchange.caller.name)

    def count_cache(self, is_hit: bool) -> None:
        """Counts a lookup in the response cache."""
        self._cache.labels("hit" if is_hit else "miss").inc()

    def render(self) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _count_tokens(self, record: Record, stats: FeedStats, key: str) -> None:
        labels = (record.model, stats.replica, key)
        self._prompt_tokens.labels(*labels).inc(stats.num_prompt_tokens)
        self._cached_tokens.labels(*labels).inc(stats.num_cached_tokens)
        self._output_tokens.labels(*labels).inc(stats.num_output_tokens)
        if stats.queue_s is not None:
            self._queue.labels(*labels).observe(stats.queue_s)
        if stats.first_news_s is None or stats.last_news_s is None:
            return
        self._ttft.labels(*labels).observe(stats.first_news_s - stats.started_s)
        self._e2e.labels(*labels).observe(stats.last_news_s - stats.started_s)
        if stats.num_output_tokens > 1:
            self._itl.labels(*labels).observe((stats.last_news_s - stats.first_news_s) / (stats.num_output_tokens - 1))
