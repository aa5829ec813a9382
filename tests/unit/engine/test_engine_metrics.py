# SPDX-License-Identifier: Apache-2.0
"""What the engine's numbers look like on the server's metrics page."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

from fakes import pb_utils
from fakes.core_client import FACTS
from wavetrain_engine.errors import EngineDead
from wavetrain_engine.request import FinishReason
from wavetrain_engine.serving.engine_metrics import EngineMetrics, samples
from wavetrain_engine.stats import EngineStats

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_blocks_total=100,
    num_blocks_used=25,
    num_requests_finished={FinishReason.STOP: 4},
    num_prompt_tokens=70,
    num_output_tokens=50,
    num_prefix_cache_queried_tokens=64,
    num_prefix_cache_hit_tokens=32,
    num_steps=9,
)


@pytest.fixture(autouse=True)
def page() -> Iterator[None]:
    pb_utils.MetricFamily.page.clear()
    yield
    pb_utils.MetricFamily.page.clear()


class Core:
    """Answers with what it was given, one after the other, the last one for ever."""

    def __init__(self, *answers: EngineStats | Exception) -> None:
        self._answers = list(answers)
        self.is_exhausted = threading.Event()

    def read_stats(self) -> EngineStats:
        if len(self._answers) == 1:
            self.is_exhausted.set()
        answer = self._answers[0] if len(self._answers) == 1 else self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def published(*answers: EngineStats | Exception) -> dict[str, float]:
    """What stands on the page after all answers."""
    core = Core(*answers, answers[-1])
    metrics = EngineMetrics(core.read_stats, FACTS, model="engine", interval_s=0.001)
    assert core.is_exhausted.wait(10)
    metrics.close(timeout_s=10)
    result: dict[str, float] = {}
    for (name, labels), metric in pb_utils.MetricFamily.page.items():
        shown = ",".join(value for key, value in sorted(labels) if key not in ("model", "version"))
        result[f"{name}{{{shown}}}" if shown else name] = metric.value()
    return result


def test_every_number_has_its_name():
    page = published(STATS)
    assert page["wavetrain_num_requests_running"] == page["nv_trt_llm_request_metrics{scheduled}"] == 3
    assert page["wavetrain_num_requests_waiting"] == page["nv_trt_llm_request_metrics{waiting}"] == 2
    assert page["nv_trt_llm_request_metrics{active}"] == 5
    assert page["wavetrain_kv_cache_usage_perc"] == page["nv_trt_llm_kv_cache_block_metrics{fraction}"] == 0.25
    assert page["nv_trt_llm_kv_cache_block_metrics{used}"] == 25
    assert page["nv_trt_llm_kv_cache_block_metrics{free}"] == 75
    assert page["nv_trt_llm_kv_cache_block_metrics{tokens_per}"] == FACTS.block_size
    assert page["wavetrain_prompt_tokens_total"] == 70
    assert page["wavetrain_generation_tokens_total"] == 50
    assert page["wavetrain_request_success_total{stop}"] == 4
    assert page["wavetrain_request_success_total{error}"] == 0
    assert page["wavetrain_prefix_cache_hits_total"] == 32
    assert page["wavetrain_steps_total"] == page["nv_trt_llm_general_metrics{iteration_counter}"] == 9


def test_names_and_labels_are_unique():
    keys = [(name, frozenset(labels.items())) for name, labels, _ in samples(STATS, FACTS, model="engine")]
    assert len(set(keys)) == len(keys)


def test_counters_go_on_after_a_core_was_started_anew():
    page = published(
        EngineStats(num_output_tokens=50, num_running=4),
        EngineDead("it died"),
        EngineStats(num_output_tokens=20),
        EngineStats(num_output_tokens=25),
    )
    assert page["wavetrain_generation_tokens_total"] == 75
    assert page["wavetrain_num_requests_running"] == 0


def test_a_core_that_does_not_answer_leaves_the_numbers_as_they_were():
    page = published(STATS, concurrent.futures.TimeoutError(), STATS)
    assert page["wavetrain_num_requests_running"] == 3
    assert page["wavetrain_generation_tokens_total"] == 50
