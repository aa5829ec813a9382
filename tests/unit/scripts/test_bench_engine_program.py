# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs' common part: what is measured, what is refused, and the worker's protocol."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from peers.engine_program import Case, decode_seconds, run_seconds, serve, summary


class FakeEngine:
    """Gives token 5 as often as asked for, or once less; requests start in different steps of 10 ms."""

    name = "fake"

    def __init__(self, *, is_losing: bool = False) -> None:
        self.is_losing = is_losing
        self.calls: list[tuple[int, int, int]] = []

    def generate(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        self.calls.append((len(prompts), len(prompts[0]), num_out))
        return [[5] * (num_out - self.is_losing) for _ in prompts]

    def token_times(self, prompts: list[list[int]], num_out: int) -> list[list[float]]:
        start = time.perf_counter()
        # A slow step at the beginning, and one at the end, when the first has finished.
        steps = [0.0, 0.5] + [0.5 + 0.01 * step for step in range(1, num_out)]
        return [[start + stamp for stamp in steps[index : index + num_out]] for index in range(min(2, len(prompts)))]


def test_a_case_is_read_and_written() -> None:
    assert Case.parse("8x64x32") == Case(8, 64, 32)
    assert str(Case(8, 64, 32)) == "8x64x32"
    with pytest.raises(ValueError):
        Case.parse("8x64")


def test_prompts_are_equal_for_equal_seeds_only() -> None:
    case = Case(3, 7, 1)
    assert case.prompts(1) == case.prompts(1)
    assert case.prompts(1) != case.prompts(2)
    assert [len(prompt) for prompt in case.prompts(0)] == [7, 7, 7]


def test_a_decoding_step_counts_only_while_all_requests_decode() -> None:
    assert decode_seconds(FakeEngine(), Case(2, 4, 8), 0) == pytest.approx(0.01)


def test_a_case_with_too_few_common_steps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="too few steps"):
        decode_seconds(FakeEngine(), Case(2, 4, 4), 0)


def test_lost_tokens_are_no_result() -> None:
    with pytest.raises(RuntimeError, match=r"\[7\] tokens instead of 8"):
        run_seconds(FakeEngine(is_losing=True), Case(2, 4, 8), 0)


def test_a_line_of_results_has_the_median_and_the_rates() -> None:
    line = summary("fake", Case(4, 30, 10), [2.0, 1.0, 4.0], is_decode=False)
    assert line == {
        "engine": "fake",
        "case": "4x30x10",
        "seconds": 2.0,
        "spread": 4.0,
        "output_tokens_per_s": 20.0,
        "total_tokens_per_s": 80.0,
    }
    assert summary("fake", Case(4, 30, 10), [0.5], is_decode=True)["decode_tokens_per_s"] == 8.0


def test_a_worker_answers_each_command_and_survives_a_wrong_one() -> None:
    engine = FakeEngine()
    commands = [
        {"do": "run", "case": "2x4x8", "seed": 1},
        {"do": "dance", "case": "2x4x8", "seed": 1},
        {"do": "tokens", "case": "2x4x8", "seed": 3},
    ]
    answers = io.StringIO()
    serve(engine, io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), answers)
    ran, refused, tokens = map(json.loads, answers.getvalue().splitlines())
    assert ran["seconds"] >= 0
    assert "dance" in refused["error"]
    assert tokens == {"prompts": Case(2, 4, 8).prompts(3), "tokens": [[5] * 8] * 2}
    # A shape is warmed up once.
    assert engine.calls == [(2, 4, 4), (2, 4, 8), (2, 4, 8)]


def test_the_programs_of_the_peers_import_nothing_of_ours() -> None:
    folder = Path(__file__).resolve().parents[3] / "scripts" / "peers"
    for program in (*folder.glob("peer_*.py"), folder / "engine_program.py", folder / "vllm_environment.py"):
        assert "wavetrain_" not in program.read_text(encoding="utf-8"), program.name
