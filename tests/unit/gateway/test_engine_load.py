# SPDX-License-Identifier: Apache-2.0
"""Reading engines' metrics pages: what is asked for, how often, and what is no page of ours."""

from __future__ import annotations

import asyncio

import pytest

from wavetrain_gateway.engine_load import EngineLoads, as_json, parse_load

PAGE = 'wavetrain_num_requests_running{model="engine"} 1\nwavetrain_kv_cache_usage_perc{model="engine"} 0.5\n'


async def test_many_who_ask_at_once_cause_one_question() -> None:
    asked: list[str] = []

    def read_page(page: str) -> str:
        asked.append(page)
        return PAGE

    loads = EngineLoads(["http://a:1/metrics", "http://b:2/metrics"], read_page)
    answers = await asyncio.gather(*(loads.read() for _ in range(20)))
    assert sorted(asked) == ["http://a:1/metrics", "http://b:2/metrics"]
    assert all([load.engine for load in answer] == ["a:1", "b:2"] for answer in answers)
    assert as_json(answers[0])["engines"] == [
        {
            "engine": engine,
            "num_running": 1,
            "num_waiting": 0,
            "kv_cache_usage": 0.5,
            "num_prompt_tokens": 0,
            "num_output_tokens": 0,
        }
        for engine in ("a:1", "b:2")
    ]


@pytest.mark.parametrize("failure", [OSError("refused"), ValueError("no page")])
async def test_who_does_not_answer_is_left_out(failure: Exception) -> None:
    def read_page(page: str) -> str:
        if "a:1" in page:
            raise failure
        return PAGE

    loads = EngineLoads(["http://a:1/metrics", "http://b:2/metrics"], read_page)
    assert [load.engine for load in await loads.read()] == ["b:2"]


def test_a_server_without_an_engine_of_ours_has_no_load() -> None:
    assert parse_load("a:1", 'nv_inference_count{model="x"} 3\n') is None


def test_a_damaged_page_is_an_error() -> None:
    with pytest.raises(ValueError, match="float"):
        parse_load("a:1", "wavetrain_num_requests_running{} x\n")
