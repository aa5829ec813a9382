# SPDX-License-Identifier: Apache-2.0
"""The results as one JSON file, and as tables in docs/benchmarks/gpu.md, whose other text stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.machine import ROOT

PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"


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
    verdict = {True: "kept", False: "**missed**", None: "not measured"}[bar["kept"]]
    return f"{bar['least']:g} of {bar['of']}: {verdict}"


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


def print_bars(bars: Sequence[Mapping[str, Any]]) -> int:
    """Prints every promise on a line; returns how many were missed."""
    for bar in bars:
        found = "-" if bar["found"] is None else f"{bar['found']:.3g}"
        word = {True: "kept", False: "MISSED", None: "not measured"}[bar["kept"]]
        print(f"{word:13} {bar['name']}: {found}, bar {bar['sign']} {bar['least']:g} ({bar['of']})")
    return sum(bar["kept"] is False for bar in bars)
