# SPDX-License-Identifier: Apache-2.0
"""One trace from the HTTP request to the engine core: the gateway, the real server and a collector on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from fakes.otlp_collector import OtlpCollector, Span, collecting
from fakes.triton_server import RunningServer, make_repository, start_server
from wavetrain_client import AsyncClient
from wavetrain_gateway.assembly import build_gateway
from wavetrain_gateway.server import GatewayServer, listen_on
from wavetrain_gateway.settings import GatewaySettings

pytestmark = pytest.mark.server
pytest.importorskip("opentelemetry.sdk.trace")

_TRACE_ID, _PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def server(
    collector: OtlpCollector, served_model: Path, served_dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    work_dir = tmp_path_factory.mktemp("traced")
    flags = {"dtype": served_dtype, "num_blocks": 256, "otlp_traces_endpoint": collector.endpoint}
    repository = make_repository(work_dir / "repository", served_model, **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # the SDK's own: milliseconds between two batches
        with start_server(repository, work_dir) as running:
            yield running


@asynccontextmanager
async def gateway_of(server: RunningServer, **sections: object):
    settings = GatewaySettings.model_validate(
        {"upstreams": [server.grpc_url], "model": "demo", "log": {"access_log": False}, **sections}
    )
    listener = listen_on("127.0.0.1", 0)
    running = GatewayServer(build_gateway(settings))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(running.serve([listener]))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
        while not running.has_started:
            await asyncio.sleep(0.01)
        yield http
    running.stop()
    await serving


def in_trace(collector: OtlpCollector, trace_id: str, num_spans: int) -> dict[str, Span]:
    """The spans of a trace by name, once there are that many."""
    spans = collector.wait_for(lambda found: sum(span.trace_id == trace_id for span in found) >= num_spans)
    return {span.name: span for span in spans if span.trace_id == trace_id}


async def test_an_http_request_and_the_core_share_the_callers_trace(collector, server) -> None:
    body = {"model": "demo", "prompt": "def __init__(self", "max_tokens": 6, "stream": True, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    headers = {"traceparent": f"00-{_TRACE_ID}-{_PARENT_ID}-01"}
    async with gateway_of(server, trace={"otlp_endpoint": collector.endpoint}) as http:
        answer = await http.post("/v1/completions", json=body, headers=headers)
        assert answer.text.endswith("[DONE]\n\n")
    spans = await asyncio.to_thread(in_trace, collector, _TRACE_ID, 5)
    assert set(spans) == {"POST /v1/completions", "llm_request", "queue", "prefill", "decode"}
    entry, whole = spans["POST /v1/completions"], spans["llm_request"]
    assert (entry.service, whole.service) == ("wavetrain-gateway", "wavetrain-engine")
    assert (entry.parent_id, whole.parent_id) == (_PARENT_ID, entry.span_id)
    assert {spans[name].parent_id for name in ("queue", "prefill", "decode")} == {whole.span_id}
    assert whole.attributes["gen_ai.usage.output_tokens"] == 6
    assert whole.attributes["gen_ai.usage.input_tokens"] == entry.attributes["gen_ai.usage.input_tokens"]
    assert spans["queue"].end_ns == spans["prefill"].start_ns <= spans["prefill"].end_ns == spans["decode"].start_ns
    assert entry.start_ns <= whole.start_ns
    assert spans["decode"].end_ns <= entry.end_ns


async def test_a_trace_begins_at_the_gateway_where_the_caller_has_none(collector, server) -> None:
    async with gateway_of(server, trace={"otlp_endpoint": collector.endpoint}) as http:
        for headers in ({}, {"traceparent": "00-nonsense-01"}):
            body = {"model": "demo", "prompt": "x", "max_tokens": 1}
            answer = await http.post("/v1/completions", json=body, headers=headers | {"x-request-id": "mine"})
            assert answer.status_code == 200

    def entries(spans: list[Span]) -> list[Span]:
        return [span for span in spans if span.attributes.get("wavetrain.request_id") == "mine"]

    found = entries(await asyncio.to_thread(collector.wait_for, lambda spans: len(entries(spans)) == 2))
    assert [span.parent_id for span in found] == ["", ""]
    for entry in found:
        spans = await asyncio.to_thread(in_trace, collector, entry.trace_id, 5)
        assert spans["llm_request"].parent_id == entry.span_id


@pytest.mark.parametrize("model", ["llm", "ensemble", "engine"])
async def test_direct_clients_send_the_parameter(collector, server, model) -> None:
    trace_id = {"llm": "1", "ensemble": "2", "engine": "3"}[model] * 32
    prompt = [1, 2, 3] if model == "engine" else "import os"
    async with AsyncClient(server.grpc_url) as client:
        await client.generate(prompt, model=model, max_tokens=2, traceparent=f"00-{trace_id}-{_PARENT_ID}-01")
    spans = await asyncio.to_thread(in_trace, collector, trace_id, 4)
    assert spans["llm_request"].parent_id == _PARENT_ID


async def test_a_gateway_without_traces_hands_the_callers_on_and_canaries_are_nobodys(collector, server) -> None:
    trace_id = "5" * 32
    async with gateway_of(server) as http:
        headers = {"traceparent": f"00-{trace_id}-{_PARENT_ID}-01"}
        answer = await http.post(
            "/v1/chat/completions",
            json={"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "n": 2},
            headers=headers,
        )
        assert answer.status_code == 200
    await asyncio.to_thread(in_trace, collector, trace_id, 8)
    roots = [span for span in collector.spans if not span.parent_id]
    assert all(span.service == "wavetrain-gateway" for span in roots)
