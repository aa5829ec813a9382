# SPDX-License-Identifier: Apache-2.0
"""What bench_peers makes of its results: the file, the ratios, the page and the plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from peers.plot import write_plot
from peers.results import Result, Results, faster
from peers.tables import write_tables

PAGE = "before\n<!-- tables: begin -->\nold\n<!-- tables: end -->\nafter\n"


def test_results_survive_the_file_and_a_part_measured_again_replaces_its_case(tmp_path: Path) -> None:
    results = Results(tmp_path / "cpu.jsonl")
    results.add([Result("129m", "wavetrain", "1x2x3", [1.0]), Result("129m", "vllm", "1x2x3", [2.0])])
    results.add([Result("129m", "wavetrain", "4x5x6", [3.0])])
    results.add([Result("129m", "wavetrain", "1x2x3", [9.0])])
    read = Results(tmp_path / "cpu.jsonl")
    found = read.find("129m", "wavetrain", "1x2x3")
    assert found is not None
    assert found.seconds == [9.0]
    # Their rounds were another run's: no ratio may be taken with them.
    assert read.find("129m", "vllm", "1x2x3") is None
    assert read.cases("129m") == ["4x5x6", "1x2x3"]


def test_ratios_are_taken_round_by_round() -> None:
    ratio = faster([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 1.0, 2.0)
    with pytest.raises(ValueError):
        faster([1.0], [1.0, 2.0])


def test_tables_replace_the_old_ones_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "cpu.md"
    page.write_text(PAGE, encoding="utf-8")
    results = Results(tmp_path / "cpu.jsonl")
    where: dict[str, object] = {"machine": "a machine", "commit": "abc", "at": "today"}
    results.add(
        [
            Result("129m", "wavetrain", "8x64x64", [1.0, 1.0], {}, where),
            Result("129m", "openvino", "8x64x64", [2.0, 4.0], {}, where),
        ]
    )
    write_tables(results, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 8x64x64 | 512 | 171 | 3.00 (2.00 to 4.00) |" in text
    assert "a machine; commit abc, today" in text


def test_a_page_without_a_place_for_tables_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "cpu.md"
    page.write_text("text", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place for the tables"):
        write_tables(Results(tmp_path / "cpu.jsonl"), page)


def test_quotients_are_computed_from_the_steps(tmp_path: Path) -> None:
    results = Results(tmp_path / "cpu.jsonl")
    for case, ours, theirs in (("1x64x32", 0.1, 0.2), ("16x64x32", 0.16, 0.4)):
        memory = Result("decode", "memory", case, [0.09], {"bytes": [1.8e9]})
        results.add([Result("decode", "wavetrain", case, [ours]), Result("decode", "openvino", case, [theirs]), memory])
    write_tables(results, tmp_path / "cpu.md")
    text = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert "| 1B shape: decode tokens/s at batch 16 over batch 1 | 10.00 | 8.00 | 1.25 |" in text
    assert "over the read bandwidth of 20.0 GB/s | 0.90 (0.90 to 0.90) |" in text


def test_the_plot_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    results = Results(tmp_path / "cpu.jsonl")
    write_plot(results, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    for case in ("1x64x64", "2x64x64"):
        results.add([Result("batch", engine, case, [1.0, 2.0]) for engine in ("wavetrain", "openvino")])
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        write_plot(results, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_weights_in_few_bits_are_put_beside_theirs_and_beside_ours_in_bfloat16(tmp_path: Path) -> None:
    page = tmp_path / "cpu.md"
    page.write_text(PAGE, encoding="utf-8")
    results = Results(tmp_path / "cpu.jsonl")
    seconds = {
        "wavetrain": 6.0,
        "wavetrain-int8": 3.0,
        "openvino-int8": 4.5,
        "wavetrain-int4": 2.0,
        "openvino-int4": 5.0,
    }
    results.add([Result("1b-quantized", engine, "16x64x32", [taken] * 3) for engine, taken in seconds.items()])
    write_tables(results, page)
    lines = page.read_text(encoding="utf-8").splitlines()
    heads = next(line for line in lines if line.startswith("| case |"))
    row = next(line for line in lines if line.startswith("| 16x64x32 |"))
    found = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert found["Wavetrain int8"] == "171"
    assert found["openvino-genai int4"] == "102"
    assert {head: cell.split()[0] for head, cell in found.items() if " over " in head} == {
        "Wavetrain int8 over openvino-genai int8": "1.50",
        "Wavetrain int8 over Wavetrain": "2.00",
        "Wavetrain int4 over openvino-genai int4": "2.50",
        "Wavetrain int4 over Wavetrain |": "3.00",
    }
