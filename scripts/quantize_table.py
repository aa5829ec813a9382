#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model in every way there is, and makes the table and the plot of docs/quantization.md.

    scripts/quantize_table.py --keep /tmp/quantized --plot docs/quantization.svg > table.md

With --keep what is finished is kept, and not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from wavetrain_engine.environment import Environment
from wavetrain_engine.quantizer.quantizer import REPORT_JSON, QuantizerJob, quantize
from wavetrain_engine.quantizer.recipe import SCHEMES, Recipe

DEMO = Path(__file__).resolve().parents[1] / "model_repository" / "engine" / "1" / "demo"
# Beside every scheme with every method that suits it.
EXTRA: dict[str, dict[str, Any]] = {
    "w4a16 gptq, groups of 32": {"scheme": "w4a16", "method": "gptq", "group_size": 32},
    "w4a16 gptq, zero points": {"scheme": "w4a16", "method": "gptq", "is_symmetric": False},
    "w4a16 gptq, without act-order": {"scheme": "w4a16", "method": "gptq", "has_act_order": False},
}


def recipes() -> dict[str, Recipe]:
    """Returns all, by what the table calls them."""
    usual: dict[str, dict[str, Any]] = {
        f"{scheme.name} {method}": {"scheme": scheme.name, "method": method}
        for scheme in SCHEMES.values()
        for method in scheme.methods
    }
    return {name: Recipe(**values) for name, values in (usual | EXTRA).items()}


def run(model_dir: Path, folder: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    """Returns the report of a recipe, made now or before."""
    out = folder / name.replace(" ", "-").replace(",", "")
    if not (out / REPORT_JSON).is_file():
        print(name, file=sys.stderr, flush=True)
        quantize(QuantizerJob(model_dir=model_dir, out=out, recipe=recipe), Environment.read(), lambda *_: None)
    return json.loads((out / REPORT_JSON).read_text(encoding="utf-8"))


def row(name: str, report: dict[str, Any]) -> str:
    """Returns a row of the table."""
    held_out, size = report["held_out"], report["size"]
    return (
        f"| {name} | {held_out['perplexity']:.3f} | {100 * (held_out['perplexity_ratio'] - 1):+.2f} % "
        f"| {held_out['kl_divergence']:.5f} | {held_out['top1_agreement']:.2%} "
        f"| {size['bytes'] / 2**20:.2f} | {report['seconds']:.0f} |"
    )


def plot(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws how far each result's predictions are from the original's, the nearest on top."""
    names = sorted(reports, key=lambda name: reports[name]["held_out"]["kl_divergence"], reverse=True)
    schemes = list(SCHEMES)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wavetrain"}):
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        divergences = [reports[name]["held_out"]["kl_divergence"] for name in names]
        colours = [f"C{schemes.index(reports[name]['recipe']['scheme'])}" for name in names]
        bars = axes.barh(names, divergences, color=colours)
        axes.bar_label(bars, [f" {reports[name]['size']['bytes'] / 2**20:.2f} MiB" for name in names], fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel("KL divergence from the original's predictions (nats), on held-out text")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="checkpoint directory (default: the demo model)")
    parser.add_argument("--keep", type=Path, help="where the checkpoints stay")
    parser.add_argument("--plot", type=Path, help="a file to draw to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        reports = {name: run(arguments.model, folder, name, recipe) for name, recipe in recipes().items()}
    original = next(iter(reports.values()))
    print(
        "| scheme, method | perplexity | over the original's | KL divergence, nats | same likeliest token | MiB | s |"
    )
    print("|---|---|---|---|---|---|---|")
    size = original["size"]["original_bytes"] / 2**20
    print(f"| original | {original['held_out']['original_perplexity']:.3f} | | | | {size:.2f} | |")
    for name, report in reports.items():
        print(row(name, report))
    if arguments.plot is not None:
        plot(reports, arguments.plot)


if __name__ == "__main__":
    main()
