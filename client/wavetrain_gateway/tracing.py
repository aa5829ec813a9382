# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry traces: one span for each request, child of the caller's `traceparent` where there is one.

What runs upstream for a request is told of the trace in turn, so the engine's spans are children of the gateway's. A
header that is ill-formed, or there twice, begins a new trace, as the W3C recommendation has it.

The packages are the extra `otel`; nothing of them is imported without an endpoint. Names follow the GenAI conventions
(`gen_ai.*`), which are still in development.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.settings import TraceSettings

_NS = 1_000_000_000


class Tracer(Protocol):
    """Tells of requests that have ended."""

    def traceparent(self, exchange: Exchange) -> str | None:
        """What tells the engine which trace a request belongs to; None where it belongs to none."""
        ...

    def record(self, exchange: Exchange) -> None:
        """Tells of one."""
        ...

    def close(self) -> None:
        """Sends what waits to be sent."""
        ...


class NoTracer:
    """Tells nobody."""

    def traceparent(self, exchange: Exchange) -> str | None:
        """The caller's own: the gateway is no part of the trace, and does not break it."""
        return exchange.traceparent

    def record(self, exchange: Exchange) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Has nothing to send."""


class OtelTracer:
    """Sends spans to an OpenTelemetry collector, in batches, from a thread of its own.

    Args:
        exporter: where spans go; None: to the settings' endpoint.

    Raises:
        ValueError: the packages are not installed.
    """

    def __init__(self, settings: TraceSettings, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
        except ImportError as error:
            raise ValueError(f"traces need the package {error.name}: pip install 'wavetrain[otel]'") from error
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "wavetrain-gateway"}),
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("wavetrain_gateway")
        self._propagator = TraceContextTextMapPropagator()

    def traceparent(self, exchange: Exchange) -> str:
        """The request's span, begun here where it was not, as a parent."""
        context = self._span_of(exchange).get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def record(self, exchange: Exchange) -> None:
        """One span with what became of the request, and an event at its first token."""
        from opentelemetry.trace import Status, StatusCode

        record, stats = exchange.record, exchange.record.stats
        span = self._span_of(exchange)
        ended_ns = time.time_ns()
        started_ns = _start_ns(exchange, ended_ns)
        span.set_attributes(
            {
                "http.route": record.route,
                "http.response.status_code": record.status,
                "wavetrain.request_id": exchange.request_id,
                "wavetrain.key": exchange.caller.name,
            }
        )
        if record.model:
            span.set_attribute("gen_ai.request.model", record.model)
        if record.finish_reasons:
            span.set_attribute("gen_ai.response.finish_reasons", record.finish_reasons)
        if stats is not None:
            span.set_attribute("gen_ai.usage.input_tokens", stats.num_prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", stats.num_output_tokens)
            span.set_attribute("wavetrain.cached_tokens", stats.num_cached_tokens)
            span.set_attribute("wavetrain.replica", stats.replica)
            if stats.queue_s is not None:
                span.set_attribute("wavetrain.queue_s", stats.queue_s)
            if stats.first_news_s is not None:
                waited_s = stats.first_news_s - stats.started_s
                span.add_event("gen_ai.first_token", timestamp=min(ended_ns, started_ns + round(waited_s * _NS)))
        if record.error_code:
            span.set_attribute("error.type", record.error_code)
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what waits to be sent."""
        self._provider.shutdown()

    def _span_of(self, exchange: Exchange) -> Any:
        from opentelemetry.trace import SpanKind

        if exchange.span is None:
            given = {"traceparent": exchange.traceparent or "", "tracestate": exchange.headers.get("tracestate", "")}
            exchange.span = self._tracer.start_span(
                f"{exchange.scope.get('method', 'WEBSOCKET')} {exchange.record.route}",
                context=self._propagator.extract(given),
                kind=SpanKind.SERVER,
                start_time=_start_ns(exchange, time.time_ns()),
            )
        return exchange.span


def _start_ns(exchange: Exchange, now_ns: int) -> int:
    return now_ns - round(exchange.elapsed_s * _NS)
