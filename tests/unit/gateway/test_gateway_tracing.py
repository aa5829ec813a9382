# SPDX-License-Identifier: Apache-2.0
"""Traces: one span for each request, under the caller's trace, without a word of prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fakes.gateway import MODEL, serve_gateway
from wavetrain_gateway.settings import TraceSettings
from wavetrain_gateway.tracing import OtelTracer

trace_export = pytest.importorskip("opentelemetry.sdk.trace.export")

_TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Kept(trace_export.SpanExporter):
    """Keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, spans: Sequence[Any]) -> Any:
        self.spans += spans
        return trace_export.SpanExportResult.SUCCESS


async def test_what_runs_upstream_is_a_child_of_the_requests_span():
    kept = Kept()
    async with serve_gateway() as gateway:
        object.__setattr__(gateway.app.services, "tracer", OtelTracer(TraceSettings(), kept))
        given = f"00-{_TRACE_ID}-00f067aa0ba902b7-01"
        body = {"model": MODEL, "prompt": ["one", "two"]}
        for headers in ([("traceparent", given)], [("traceparent", given)] * 2, [("traceparent", given[:-1])], []):
            await gateway.http.post("/v1/completions", json=body, headers=headers)
        sent = [request.parameters["traceparent"] for request in gateway.generations]
        unsampled = [("traceparent", given[:-1] + "0")]
        await gateway.http.post("/v1/completions", json=body, headers=unsampled)
        assert gateway.generations[-1].parameters["traceparent"].startswith(f"00-{_TRACE_ID}-")
        assert gateway.generations[-1].parameters["traceparent"].endswith("-00")
    spans = [span for span in kept.spans if span.name == "POST /v1/completions"]
    contexts = [span.context for span in spans]
    parents = [f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}" for context in contexts]
    assert sent == [parent for parent in parents for _ in range(2)]
    assert [_TRACE_ID in parent for parent in parents] == [True, False, False, False]


async def test_without_traces_the_callers_own_goes_on():
    async with serve_gateway() as gateway:
        given = f"00-{_TRACE_ID}-00f067aa0ba902b7-01"
        await gateway.http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"traceparent": given})
        await gateway.complete()
        first, second = gateway.generations
        assert first.parameters["traceparent"] == given
        assert "traceparent" not in second.parameters
        canary = next(request for request in gateway.fake.requests if request not in gateway.generations)
        assert canary.parameters["traceparent"].endswith("-00")  # never sampled


async def test_a_request_is_a_span_of_the_callers_trace():
    kept = Kept()
    tracer = OtelTracer(TraceSettings(), kept)
    async with serve_gateway() as gateway:
        object.__setattr__(gateway.app.services, "tracer", tracer)
        headers = {"traceparent": f"00-{_TRACE_ID}-00f067aa0ba902b7-01"}
        body = {"model": MODEL, "prompt": "a secret prompt"}
        await gateway.http.post("/v1/completions", json=body, headers=headers)
        await gateway.http.post("/v1/completions", json=body | {"n": 99})
    first, second = (span for span in kept.spans if span.name == "POST /v1/completions")
    assert f"{first.context.trace_id:032x}" == _TRACE_ID
    assert first.attributes["gen_ai.request.model"] == MODEL
    assert first.attributes["gen_ai.usage.output_tokens"] == 3
    assert [event.name for event in first.events] == ["gen_ai.first_token"]
    assert first.start_time <= first.events[0].timestamp <= first.end_time
    assert second.attributes["error.type"] == "invalid_value"
    assert "secret" not in str([span.attributes for span in kept.spans])
