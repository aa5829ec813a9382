# SPDX-License-Identifier: Apache-2.0
"""Spans of requests: what they say, whose trace they belong to, and that nothing is imported where nobody asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from fakes.core import CoreHarness
from fakes.otlp_collector import collecting
from wavetrain_engine.errors import ConfigError, ErrorCode
from wavetrain_engine.fan_out import child_requests
from wavetrain_engine.request import EngineRequest, FinishReason, RequestStats, RequestUpdate
from wavetrain_engine.request_tracer import RequestTracer
from wavetrain_engine.sampling_params import SamplingParams

trace_export = pytest.importorskip("opentelemetry.sdk.trace.export")

_TRACE_ID, _PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
_TRACEPARENT = f"00-{_TRACE_ID}-{_PARENT_ID}-01"
_S = 1_000_000_000


class Kept(trace_export.SpanExporter):
    """Keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, spans: Sequence[Any]) -> Any:
        self.spans += spans
        return trace_export.SpanExportResult.SUCCESS


def ended(**stats: int) -> RequestUpdate:
    return RequestUpdate(
        request_id="r",
        finish_reason=FinishReason.LENGTH,
        stats=RequestStats(arrival_time_ns=_S, num_prompt_tokens=7, num_output_tokens=5, num_cached_tokens=4, **stats),
    )


COMPLETE = ended(first_scheduled_time_ns=2 * _S, first_token_time_ns=4 * _S, last_token_time_ns=7 * _S)


def spans_of(*requests: tuple[str, RequestUpdate]) -> list[Any]:
    kept = Kept()
    tracer = RequestTracer(kept)
    for traceparent, update in requests:
        tracer.record(traceparent, update)
    tracer.close()
    return kept.spans


def trace_id(span: Any) -> str:
    return f"{span.context.trace_id:032x}"


def test_a_request_is_a_span_with_its_phases_in_the_callers_trace() -> None:
    *phases, whole = spans_of((_TRACEPARENT, COMPLETE))
    assert {trace_id(span) for span in (*phases, whole)} == {_TRACE_ID}
    assert f"{whole.parent.span_id:016x}" == _PARENT_ID
    assert all(span.parent.span_id == whole.context.span_id for span in phases)
    moments = [(span.name, span.start_time // _S, span.end_time // _S) for span in phases]
    assert moments == [("queue", 1, 2), ("prefill", 2, 4), ("decode", 4, 7)]
    assert whole.name == "llm_request"
    assert whole.start_time == _S
    said = whole.attributes
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (7, 5)
    assert (said["gen_ai.latency.time_in_queue"], said["gen_ai.latency.time_to_first_token"]) == (1.0, 3.0)
    assert said["wavetrain.cached_tokens"] == phases[1].attributes["wavetrain.cached_tokens"] == 4
    assert phases[2].attributes["gen_ai.usage.output_tokens"] == 5


@pytest.mark.parametrize(
    "given",
    [
        "",
        "nonsense",
        _TRACEPARENT.upper(),
        f"00-{'0' * 32}-{_PARENT_ID}-01",
        f"00-{_TRACE_ID}-{'0' * 16}-01",
        f"ff-{_TRACE_ID}-{_PARENT_ID}-01",
        f"00-{_TRACE_ID}-{_PARENT_ID}-01-more",
        f"00-{_TRACE_ID[:-1]}-{_PARENT_ID}-01",
        f"00-{_TRACE_ID}-{_PARENT_ID}",
        f"00-{_TRACE_ID}-{_PARENT_ID}-0g",
    ],
)
def test_an_ill_formed_parent_begins_a_new_trace(given: str) -> None:
    spans = spans_of((given, COMPLETE))
    assert [span.name for span in spans] == ["queue", "prefill", "decode", "llm_request"]
    assert len({trace_id(span) for span in spans}) == 1
    assert trace_id(spans[0]) != _TRACE_ID
    assert spans[-1].parent is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    spans = spans_of((f"01-{_TRACE_ID}-{_PARENT_ID}-01-what-comes-later", COMPLETE))
    assert {trace_id(span) for span in spans} == {_TRACE_ID}


def test_a_trace_that_is_not_sampled_is_not_told_of() -> None:
    assert spans_of((f"00-{_TRACE_ID}-{_PARENT_ID}-00", COMPLETE)) == []


def test_a_request_that_ended_early_has_fewer_phases() -> None:
    waiting, prompt = ended(), ended(first_scheduled_time_ns=2 * _S)
    assert [span.name for span in spans_of(("", waiting))] == ["queue", "llm_request"]
    assert [span.name for span in spans_of(("", prompt))] == ["queue", "prefill", "llm_request"]
    failed = RequestUpdate(
        request_id="r", finish_reason=FinishReason.ERROR, error_code=ErrorCode.INTERNAL, error="secret", stats=None
    )
    (_, whole) = spans_of(("", failed))
    assert (whole.attributes["error.type"], whole.status.is_ok) == (ErrorCode.INTERNAL.value, False)
    assert "secret" not in str(whole.attributes)
    assert all(span.start_time <= span.end_time for span in spans_of(("", ended(first_scheduled_time_ns=1))))


def test_the_core_tells_of_every_accepted_end_once() -> None:
    told: list[tuple[str, RequestUpdate]] = []
    harness = CoreHarness(max_num_seqs=2, on_end=lambda traceparent, update: told.append((traceparent, update)))
    harness.add("a", [1, 2], max_tokens=2, traceparent=_TRACEPARENT)
    harness.add("b", [1, 2], max_tokens=50)
    harness.step()
    harness.core.cancel("b")
    harness.run()
    assert [(traceparent, update.request_id) for traceparent, update in told] == [("", "b"), (_TRACEPARENT, "a")]
    assert told[1][1] == harness.last("a")


def test_all_sequences_of_a_request_belong_to_its_trace() -> None:
    request = EngineRequest(
        request_id="r", prompt_token_ids=[1], sampling_params=SamplingParams(n=3), traceparent=_TRACEPARENT
    )
    assert [child.traceparent for child in child_requests(request)] == [_TRACEPARENT] * 3


def test_spans_reach_a_collector_before_the_end() -> None:
    with collecting() as collector:
        tracer = RequestTracer.to(collector.endpoint)
        assert tracer is not None
        tracer.record(_TRACEPARENT, COMPLETE)
        tracer.close()
        tracer.close()
        assert {span.trace_id for span in collector.spans} == {_TRACE_ID}
        assert {span.service for span in collector.spans} == {"wavetrain-engine"}


def test_what_cannot_be_traced_to_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RequestTracer.to(None) is None
    with pytest.raises(ConfigError, match="expected an address as http://collector:4318"):
        RequestTracer.to("collector:4317")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'wavetrain\[otel\]'"):
        RequestTracer.to("http://127.0.0.1:1/v1/traces")


def test_nothing_is_imported_where_nobody_traces() -> None:
    program = """
import sys
import wavetrain_engine.core_process, wavetrain_engine.local_engine
from wavetrain_engine.request_tracer import RequestTracer
from wavetrain_gateway.assembly import build_gateway
from wavetrain_gateway.settings import GatewaySettings
assert RequestTracer.to(None) is None
build_gateway(GatewaySettings())
sys.exit(any(name.partition(".")[0] == "opentelemetry" for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
