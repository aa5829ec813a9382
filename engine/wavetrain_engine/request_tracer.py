# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry spans of ended requests: `llm_request`, and in it `queue`, `prefill` (to the first token), `decode`.

A request that came with a W3C `traceparent` continues that trace, and is not told of where its sampled flag is unset;
one without, or with an ill-formed one, begins a trace, as the W3C recommendation has it. Spans are made when a request
has ended, from its RequestStats, on a thread of their own: the engine's thread puts one item into a queue for each
request, and nothing for a token. The packages are the extra `otel`, imported only where there is an endpoint.
Attributes are `gen_ai.*`, whose conventions are still in development, and vLLM's.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.request import FinishReason, RequestStats, RequestUpdate

_CLOSE_TIMEOUT_S = 2.0


class RequestTracer:
    """Sends spans to an OpenTelemetry collector.

    Args:
        exporter: where spans go.
    """

    def __init__(self, exporter: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Which traces that begin here are kept, OTEL_TRACES_SAMPLER says; all without it.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "wavetrain-engine"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("wavetrain_engine")
        self._propagator = TraceContextTextMapPropagator()
        self._ended: queue.SimpleQueue[tuple[str, RequestUpdate, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="wavetrain-traces", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, endpoint: str | None) -> RequestTracer | None:
        """The tracer that sends to an OTLP endpoint over HTTP; None without one.

        Raises:
            ConfigError: the endpoint is no address, or the packages are not installed.
        """
        if endpoint is None:
            return None
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_traces_endpoint: expected an address as http://collector:4318/v1/traces, got {endpoint[:80]!r}"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            return cls(OTLPSpanExporter(endpoint=endpoint))
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs the package {error.name}: pip install 'wavetrain[otel]'"
            ) from error

    def record(self, traceparent: str, update: RequestUpdate) -> None:
        """Tells of a request by its last update; costs an append."""
        self._ended.put((traceparent, update, time.time_ns()))

    def close(self) -> None:
        """Sends what waits to be sent, for at most two seconds. Idempotent."""
        self._ended.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (item := self._ended.get()) is not None:
            self._tell(*item)
        self._provider.shutdown()

    def _tell(self, traceparent: str, update: RequestUpdate, ended_ns: int) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        stats = update.stats or RequestStats()
        began_ns = min(stats.arrival_time_ns or ended_ns, ended_ns)
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract({"traceparent": traceparent}) if traceparent else None,
            kind=SpanKind.SERVER,
            start_time=began_ns,
            attributes=_attributes(update, stats, began_ns, ended_ns),
        )
        if update.finish_reason is FinishReason.ERROR:
            span.set_status(Status(StatusCode.ERROR))
        if span.is_recording():
            context = set_span_in_context(span)
            for name, start_ns, end_ns, attributes in _phases(stats, began_ns, ended_ns):
                child = self._tracer.start_span(name, context=context, start_time=start_ns, attributes=attributes)
                child.end(end_ns)
        span.end(ended_ns)


def _attributes(update: RequestUpdate, stats: RequestStats, began_ns: int, ended_ns: int) -> dict[str, Any]:
    reason = update.finish_reason
    found: dict[str, Any] = {
        "gen_ai.request.id": update.request_id,
        "gen_ai.response.finish_reasons": [] if reason is None else [reason.value],
        "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
        "gen_ai.usage.output_tokens": stats.num_output_tokens,
        "gen_ai.latency.e2e": _seconds(began_ns, ended_ns),
        "wavetrain.cached_tokens": stats.num_cached_tokens,
        "wavetrain.preemptions": stats.num_preemptions,
    }
    if stats.first_scheduled_time_ns:
        found["gen_ai.latency.time_in_queue"] = _seconds(began_ns, stats.first_scheduled_time_ns)
    if stats.first_token_time_ns:
        found["gen_ai.latency.time_to_first_token"] = _seconds(began_ns, stats.first_token_time_ns)
    if update.error_code is not None:
        found["error.type"] = update.error_code.value
    return found


def _phases(stats: RequestStats, began_ns: int, ended_ns: int) -> list[tuple[str, int, int, dict[str, int]]]:
    """Name, start, end and attributes of what the request went through; one that ended early has fewer."""
    scheduled_ns, first_ns = stats.first_scheduled_time_ns, stats.first_token_time_ns
    # A clock that was set back makes a span of no length, never one that ends before it began.
    queued_until_ns = max(began_ns, scheduled_ns or ended_ns)
    phases: list[tuple[str, int, int, dict[str, int]]] = [("queue", began_ns, queued_until_ns, {})]
    if scheduled_ns:
        counts = {
            "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
            "wavetrain.cached_tokens": stats.num_cached_tokens,
        }
        first_token_ns = max(queued_until_ns, first_ns or ended_ns)
        phases.append(("prefill", queued_until_ns, first_token_ns, counts))
        if first_ns:
            counts = {"gen_ai.usage.output_tokens": stats.num_output_tokens}
            phases.append(("decode", first_token_ns, max(first_token_ns, stats.last_token_time_ns), counts))
    return phases


def _seconds(start_ns: int, end_ns: int) -> float:
    return max(0, end_ns - start_ns) / 1e9
