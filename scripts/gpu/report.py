# SPDX-License-Identifier: Apache-2.0
"""The results as one JSON file, and as tables in docs/benchmarks/gpu.md, whose other text stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.machine import ROOT

PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"
_VERDICTS = {True: "kept", False: "**missed**", None: "not measured"}


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Writes the results, whole or not at all: a run may be cut off while it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write_section(page: Path, name: str, text: str) -> None:
    """Puts text between the marks `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page.

    Raises:
        ValueError: the page has not both marks, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8")
    head, found_begin, rest = old.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{page.name} has no section {name!r}")
    page.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread_text(spread: Mapping[str, float] | None, digits: int = 2) -> str:
    """Returns a median with its range; a dash where there is none."""
    if not spread:
        return "-"
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"


def bar_text(bar: Mapping[str, Any] | None) -> str:
    """Returns a promise and whether it was kept."""
    if not bar:
        return ""
    return f"{bar['least']:g} of {bar['of']}: {_VERDICTS[bar['kept']]}"


def where_text(where: Mapping[str, Any]) -> str:
    """Returns the line above a table: device, versions, commit."""
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "transformers") if where.get(name))
    return f"{where['device']}; {versions}; commit {where['commit']}, {where['at']}."


def kernel_tables(results: Mapping[str, Any]) -> str:
    """Returns the section of bench_kernels: the limits, then every contest with its peers."""
    limits = results["limits"]
    intro = (
        f"{where_text(results['where'])} Limits of the same run: copy {limits['copy_gb_s']['median']:.0f} GB/s, "
        f"read {limits['read_gb_s']['median']:.0f} GB/s, bf16 matrix product "
        f"{limits['matmul_tflop_s']['median']:.0f} TFLOP/s."
    )
    rows: list[list[object]] = []
    for record in results["contests"]:
        if "us" not in record:
            rows.append([record["group"], record["case"], record.get("failed", "not measured"), "", "", "", ""])
            continue
        peers = [f"{name} {spread_text(p.get('ours_over_theirs'))}" for name, p in record["peers"].items() if "us" in p]
        share = f"{spread_text(record['of_limit'])} of {record['limit']}"
        micros = f"{record['us']['median']:.4g}"
        rows.append([record["group"], record["case"], micros, share, "; ".join(peers), bar_text(record.get("bar"))])
    header = ["operation", "case", "µs", "least time over ours", "times faster than", "bar"]
    absent = {
        name: p["unavailable"] for r in results["contests"] for name, p in r.get("peers", {}).items() if "us" not in p
    }
    notes = "".join(f"\n- {name}: not measured ({reason})" for name, reason in sorted(absent.items()))
    return f"{intro}\n\n{table(header, [row[:6] for row in rows])}\n{notes}"


def engine_tables(results: Mapping[str, Any]) -> str:
    """Returns the section of bench_gpu: the bars, then the figures behind them."""
    bars = [
        [bar["name"], _found_text(bar["found"]), f"{bar['sign']} {bar['least']:g} {bar['of']}", _VERDICTS[bar["kept"]]]
        for bar in results["bars"]
    ]
    parts = results["parts"]
    sections = [
        f"{results['shape']}, random weights, bf16. {where_text(results['where'])}",
        table(["what", "found", "bar", ""], bars),
    ]
    step = parts.get("step", {})
    if "gap_ms_by_context" in step:
        rows = [[context, spread_text(gap, 3)] for context, gap in step["gap_ms_by_context"].items()]
        sections.append(table(["context, tokens", "ms between tokens, batch 1"], rows))
        sections.append(
            f"Fitted: {step['intercept_ms']:.3f} ms + {step['slope_ms_per_1k_tokens']:.4f} ms per 1000 tokens; "
            f"{step['intercept_over_floor']:.2f} and {step['slope_over_floor']:.2f} times bytes over copy bandwidth."
        )
    throughput = parts.get("throughput", {})
    runs = [["Wavetrain", *_run_cells(run)] for run in throughput.get("ours", [])]
    if "theirs" in throughput:
        runs.append(["transformers generate_batch", *_run_cells(throughput["theirs"])])
    if runs:
        sections.append(table(["256 requests, 1000 in, 1000 out", "output tokens/s", "seconds"], runs))
    failed = [f"- {part}: {found['failed']}" for part, found in parts.items() if "failed" in found]
    return "\n\n".join([*sections, *(["Not measured:\n\n" + "\n".join(failed)] if failed else [])])


def _found_text(found: float | None) -> str:
    return "-" if found is None else f"{found:.3g}"


def _run_cells(run: Mapping[str, Any]) -> list[str]:
    if "failed" in run:
        return [run["failed"], ""]
    return [f"{run['output_tokens_per_s']:.0f}", f"{run['seconds']:.1f}"]


def print_bars(bars: Sequence[Mapping[str, Any]]) -> int:
    """Prints every promise on a line; returns how many were missed."""
    for bar in bars:
        word = {True: "kept", False: "MISSED", None: "not measured"}[bar["kept"]]
        print(f"{word:13} {bar['name']}: {_found_text(bar['found'])}, bar {bar['sign']} {bar['least']:g} ({bar['of']})")
    return sum(bar["kept"] is False for bar in bars)
