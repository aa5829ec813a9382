# SPDX-License-Identifier: Apache-2.0
"""The engine's numbers on the metrics page of the real server."""

from __future__ import annotations

import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes.triton_calls import post
from fakes.triton_server import RunningServer

pytestmark = pytest.mark.server


def read_page(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def number(page: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    """The one number of this name whose labels hold these."""
    (value,) = [value for (key, found), value in page.items() if key == name and labels.items() <= dict(found).items()]
    return value


def test_a_request_moves_the_engine_s_numbers(triton_server: RunningServer) -> None:
    name = "wavetrain_generation_tokens_total"
    before = number(read_page(triton_server), name, model="engine")
    post(f"{triton_server.http_url}/v2/models/llm/generate", {"text_input": "import os", "max_tokens": 7})
    deadline_s = time.monotonic() + 30
    while number(page := read_page(triton_server), name) < before + 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert number(page, "wavetrain_num_requests_running") == 0
    assert number(page, "nv_trt_llm_request_metrics", request_type="waiting", model="tensorrt_llm") == 0
    assert number(page, "nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") > 0
    assert number(page, "wavetrain_cache_config_info", block_size="16") == 1
