# SPDX-License-Identifier: Apache-2.0
"""What the GPU scripts do without a GPU: statistics, judgement, files, tables, and the stand-in for a package."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_gpu
import gpu_check
from gpu import msgspec_stand_in, report, rounds, shapes
from gpu.bench_worker import read_results
from gpu.contest import Contest, bar_of, relative_error, run_contest
from gpu.kernel_checks import read_report
from gpu.limits import Limits
from gpu.machine import child_environment
from gpu.rounds import Line, Spread
from gpu.timing import HostTimer, num_sets
from wavetrain_engine.models.model_config import ModelConfig

CPU = torch.device("cpu")


def test_rounds_go_there_and_back() -> None:
    assert list(rounds.turns(["a", "b"], 3)) == [["a", "b"], ["b", "a"], ["a", "b"]]
    order: list[str] = []
    figures = rounds.take_turns({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, 2)
    assert order == ["a", "b", "b", "a"]
    assert figures == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_quotients_are_taken_round_by_round() -> None:
    assert rounds.ratio([1.0, 2.0, 6.0], [1.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="longer"):
        rounds.ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no rounds"):
        Spread.of([])


def test_a_line_is_fitted_and_says_how_badly() -> None:
    line = Line.fit([(0, 1.0), (10, 2.0), (20, 3.0)])
    assert (line.intercept, line.slope) == pytest.approx((1.0, 0.1))
    assert line.worst == pytest.approx(0.0)
    assert Line.fit([(0, 1.0), (1, 2.0), (2, 2.0)]).worst > 0.05
    with pytest.raises(ValueError, match="two different"):
        Line.fit([(1, 1.0), (1, 2.0)])


def test_overlapping_work_is_busy_once() -> None:
    assert rounds.busy_time([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert rounds.busy_time([]) == 0


def test_figures_are_rounded_to_significant_digits() -> None:
    assert rounds.significant(0.000123456) == 0.0001235
    assert Spread(1.23456, 1, 2).as_json(2) == {"median": 1.2, "low": 1.0, "high": 2.0}


def test_buffers_rotate_beyond_the_cache() -> None:
    cuda = torch.device("cuda")
    assert num_sets(10**9, cuda) == 2
    assert num_sets(10**6, cuda) == 128
    assert num_sets(1, cuda) == 512
    assert num_sets(1, CPU) == 2


LIMITS = Limits(copy=Spread(100.0, 90, 110), read=Spread(120.0, 110, 130), matmul=Spread(1000.0, 900, 1100))


def test_the_slower_of_moving_and_computing_is_the_limit() -> None:
    assert LIMITS.seconds(200, 100) == (2.0, "copy bandwidth")
    assert LIMITS.seconds(1, 5000) == (5.0, "matrix product")


def make_contest(**changes: Any) -> Contest:
    one = torch.ones(3)
    values: dict[str, Any] = {
        "group": "sum",
        "case": "3",
        "num_bytes": 12,
        "num_flops": 0,
        "ours": [lambda: one * 2] * 2,
        "error": lambda out: relative_error(out, one * 2),
        "tolerance": 1e-6,
    }
    return Contest(**values | changes)


def raise_missing() -> list[Any]:
    raise ImportError("no such library\nand more")


def test_a_contest_has_ours_and_whoever_can_do_it() -> None:
    peers = {
        "torch": lambda: [lambda: torch.full((3,), 2.0)],
        "wrong": lambda: [lambda: torch.zeros(3)],
        "missing": raise_missing,
    }
    contest = make_contest(peers=peers, bar=("torch", 0.5))
    record = run_contest(contest, HostTimer(CPU), LIMITS, 3)
    assert record["error"] == 0
    assert record["us"]["median"] > 0
    assert record["peers"]["torch"]["ours_over_theirs"]["median"] > 0
    assert record["peers"]["wrong"] == {"unavailable": "relative error 1"}
    assert record["peers"]["missing"] == {"unavailable": "no such library"}
    assert record["bar"]["of"] == "torch"
    assert record["bar"]["kept"] in (True, False)


def test_what_is_wrong_is_not_timed() -> None:
    for result in (torch.zeros(3), torch.full((3,), float("nan"))):
        record = run_contest(make_contest(ours=[lambda result=result: result]), HostTimer(CPU), LIMITS, 3)
        assert "wrong result" in record["failed"]
        assert "us" not in record


def test_a_bar_without_a_figure_is_neither_kept_nor_missed() -> None:
    assert bar_of(("limit", 0.8), Spread(0.9, 0.8, 1.0), {})["kept"] is True
    assert bar_of(("limit", 0.95), Spread(0.9, 0.8, 1.0), {})["kept"] is False
    assert bar_of(("cudnn sdpa", 0.8), Spread(0.9, 0.8, 1.0), {})["kept"] is None


def test_bars_of_the_engine_know_both_directions() -> None:
    parts = {"step": {"step_over_floor": 1.3}, "throughput": {"ours_over_theirs": 1.4}, "replay": {"failed": "no"}}
    judged = {bar.name: bar.judge({"parts": parts})["kept"] for bar in bench_gpu.BARS}
    assert judged["step at batch 1"] is True
    assert judged["throughput"] is False
    assert judged["engine at batch 32"] is judged["GPU idle at batch 32"] is None


def test_throughput_is_compared_over_both_of_our_runs() -> None:
    run = {"output_tokens_per_s": 300.0, "seconds": 1.0}
    ours, again = {"throughput": run}, {"throughput": {**run, "output_tokens_per_s": 100.0}}
    theirs = {"throughput": {"output_tokens_per_s": 100.0, "seconds": 1.0}}
    assert bench_gpu._compare(ours, theirs, again)["ours_over_theirs"] == 2.0
    assert "ours_over_theirs" not in bench_gpu._compare(ours, {"throughput": {"failed": "not done"}}, again)
    assert bench_gpu._compare({"throughput": {"failed": "no"}}, theirs, {})["failed"] == "no"


@pytest.mark.parametrize(("ran_s", "kept"), [(30.0, True), (12.0, None)])
def test_a_peer_that_was_ended_is_slower_by_as_much_at_least(ran_s: float, kept: bool | None) -> None:
    ours = {"throughput": {"output_tokens_per_s": 300.0, "seconds": 10.0}}
    theirs = {"throughput": {"failed": "not done after 40 s"}, "ran_s": ran_s}
    found = bench_gpu._compare(ours, theirs, {})
    assert found["ours_over_theirs"] == ran_s / 10
    (bar,) = [bar for bar in bench_gpu.BARS if bar.name == "throughput"]
    assert bar.judge({"parts": {"throughput": found}})["kept"] is kept


def test_parts_that_failed_after_another_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(_args: object, _engine: str, parts: list[str], *_rest: object) -> dict[str, Any]:
        asked.append(parts)
        return {"start": {"run": len(asked)}} | {
            part: {"failed": "dead"} if len(asked) == 1 and part != "step" else {"run": len(asked)} for part in parts
        }

    monkeypatch.setattr(bench_gpu, "_run", run)
    args = bench_gpu._parser().parse_args(["--no-peer"])
    parts = bench_gpu._measure(args, ["step", "idle", "replay", "throughput"], "tiny")["parts"]
    assert asked == [["step", "idle", "replay", "throughput"], ["replay", "throughput"]]
    assert parts["idle"] == {"failed": "dead"}
    assert (parts["start"], parts["step"], parts["replay"]) == ({"run": 1}, {"run": 1}, {"run": 2})


def test_a_part_whose_process_dies_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    assert gpu_check._end_of("sizes", 0, file) is not None  # it wrote nothing
    file.write_text('{"results": [{"name": "one", "right": true}]}', encoding="utf-8")
    assert gpu_check._end_of("sizes", 1, file) is None
    end = gpu_check._end_of("sizes", -signal.SIGSEGV, file)
    assert end is not None
    assert (end["right"], end["detail"]) == (False, "its process ended with -11")
    assert gpu_check._results({"sizes": file, "greedy": tmp_path / "none.json"}) == [{"name": "one", "right": True}]


def test_results_of_a_process_that_was_ended_are_read(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert read_results(file) == {}
    file.write_text('{"start": {"load_s": 1}}\n{"step": {"gap', encoding="utf-8")
    assert read_results(file) == {"start": {"load_s": 1}}


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(
        "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n", encoding="utf-8"
    )
    report.write_section(page, "x", "new\n")
    text = page.read_text(encoding="utf-8")
    assert text == "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n"
    with pytest.raises(ValueError, match="no section"):
        report.write_section(page, "z", "")


def test_the_page_has_the_sections_that_are_written() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("kernels", "engine"):
        assert f"<!-- {name}: begin -->" in text
        assert f"<!-- {name}: end -->" in text


WHERE = {"device": "NVIDIA X", "torch": "2", "triton": "3", "transformers": None, "commit": "abc", "at": "now"}


def test_tables_of_the_kernels_name_what_is_missing() -> None:
    peers = {"torch": lambda: [lambda: torch.full((3,), 2.0)], "missing": raise_missing}
    contest = make_contest(peers=peers, bar=("limit", 0.5))
    records = [run_contest(contest, HostTimer(CPU), LIMITS, 3), {"group": "g", "case": "c", "failed": "wrong"}]
    text = report.kernel_tables({"where": WHERE, "limits": LIMITS.as_json(), "contests": records})
    assert "NVIDIA X; torch 2, triton 3; commit abc" in text
    assert "torch " in text
    assert "0.5 of limit" in text
    assert "| g | c | wrong |" in text
    assert "- missing: not measured (no such library)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_tables_of_the_engine_show_what_there_is() -> None:
    spread = {"median": 4.0, "low": 3.9, "high": 4.1}
    parts = {
        "step": {
            "gap_ms_by_context": {"256": spread},
            "intercept_ms": 4.0,
            "slope_ms_per_1k_tokens": 0.03,
            "intercept_over_floor": 1.1,
            "slope_over_floor": 1.05,
        },
        "throughput": {"ours": [{"output_tokens_per_s": 9.0, "seconds": 1.0}], "theirs": {"failed": "not done"}},
        "idle": {"failed": "no tracer"},
    }
    results = {
        "where": WHERE,
        "shape": "tiny",
        "parts": parts,
        "bars": [bar.judge({"parts": parts}) for bar in bench_gpu.BARS],
    }
    text = report.engine_tables(results)
    assert "4.000 (3.900 to 4.100)" in text
    assert "transformers generate_batch | not done" in text
    assert "- idle: no tracer" in text


def test_json_is_written_whole(tmp_path: Path) -> None:
    report.write_json(tmp_path / "new" / "a.json", {"x": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"x": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_report_of_unit_tests_becomes_a_check_a_file(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="a.test_one" name="x"/><testcase classname="a.test_one" name="y">'
        '<failure message="3 is\n not 4"/></testcase>'
        '<testcase classname="a.test_two" name="z"><skipped/></testcase></testsuite></testsuites>',
        encoding="utf-8",
    )
    one, two = read_report(file)
    assert (one.is_right, one.detail) == (False, "1 failure, 1 passed; first: y: 3 is not 4")
    assert (two.is_right, two.detail) == (True, "1 skipped")
    file.write_text("<testsuites/>", encoding="utf-8")
    assert not read_report(file)[0].is_right


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_are_read_as_models(shape: str, tmp_path: Path) -> None:
    config = ModelConfig.load(shapes.write_config(tmp_path / shape, shape))
    assert config.hidden_size == shapes.SHAPES[shape]["hidden_size"]
    assert shapes.kv_bytes_per_token("llama-3.1-8b") == 131072
    assert shapes.weight_bytes_read("llama-3.1-8b", 16_060_522_496) == 16_060_522_496 - 128256 * 4096 * 2


def test_structs_of_the_stand_in_are_as_the_engine_uses_them() -> None:
    class Point(msgspec_stand_in.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
        x: int
        tags: list[str] = []  # noqa: RUF012 -- that is what is tested

    point = Point(x=1)
    point.tags.append("mine")
    assert Point(x=1).tags == []
    assert Point.__struct_fields__ == ("x", "tags")
    assert msgspec_stand_in.replace(point, x=2) == Point(x=2, tags=["mine"])
    assert msgspec_stand_in.asdict(point) == {"x": 1, "tags": ["mine"]}
    assert msgspec_stand_in.convert({"x": 3}, Point) == Point(x=3)
    assert hash(msgspec_stand_in.convert({"x": 3, "tags": ()}, Point)) == hash(Point(x=3, tags=()))  # pyright: ignore
    assert msgspec_stand_in.install_where_missing() is False  # it is installed here


_WITHOUT = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("msgspec", "tritonclient", "rich", "jinja2"):
            raise ModuleNotFoundError(name)
class Missing:
    find_spec = staticmethod(lambda name, package=None: None if name == "msgspec" else real(name, package))
import importlib.util
real, importlib.util.find_spec = importlib.util.find_spec, Missing.find_spec
sys.meta_path.insert(0, Refuse())
from gpu import machine
machine.prepare(is_dry_run=False)
from pathlib import Path
from gpu.engine import Engine
from gpu.shapes import write_config
folder = write_config(Path(sys.argv[1]), "tiny")
with Engine(folder, load_format="dummy", dtype="float32", device="cpu", num_blocks=64, max_model_len=128) as engine:
    timelines = engine.run(engine.prompts(3, 9), 5)
    print([len(timeline.token_ids) for timeline in timelines], engine.weights_s >= 0, "msgspec.structs" in sys.modules)
"""


def test_the_engine_runs_where_only_torch_is_installed(tmp_path: Path) -> None:
    environment = {**child_environment(), "WAVETRAIN_KERNELS": "reference"}
    command = [sys.executable, "-c", _WITHOUT, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[5, 5, 5] True True\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("bench_gpu.py", ["--parts", "step,speed"], "unknown: speed"),
        ("gpu_check.py", ["--parts", "all"], "unknown: all"),
        ("tune_kernels.py", ["--only", "norms"], "unknown: norms"),
        ("bench_kernels.py", [], "no NVIDIA GPU"),
        ("gpu_check.py", [], "no NVIDIA GPU"),
        ("tune_kernels.py", ["--dry-run"], "give --out"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_programs_say_what_is_wrong(program: str, arguments: list[str], message: str) -> None:
    script = Path(bench_gpu.__file__).with_name(program)
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("program", ["bench_gpu.py", "bench_kernels.py"])
def test_figures_of_a_dry_run_do_not_go_into_the_page(program: str, tmp_path: Path) -> None:
    file = tmp_path / "dry.json"
    file.write_text('{"dry_run": true}', encoding="utf-8")
    command = [sys.executable, str(Path(bench_gpu.__file__).with_name(program)), "--tables", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "dry run" in done.stderr
