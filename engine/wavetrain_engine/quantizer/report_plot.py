# SPDX-License-Identifier: Apache-2.0
"""A report as a picture: the error of each matrix, layer by layer, in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from wavetrain_engine.quantizer.report import Report

_WIDTH, _HEIGHT = 860, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 190, 84, 56
# Of matrices in the order in which a layer has them; what the Okabe-Ito palette has that is seen on white.
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#000000", "#7f7f7f")
_SMALLEST = 1e-9


def draw_report(report: Report) -> str:
    """Returns the picture. Errors of experts of one kind are averaged."""
    series = _series(report)
    values = [max(value, _SMALLEST) for points in series.values() for _, value in points]
    low = math.floor(math.log10(min(values, default=1e-3)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)
    parts = [*_frame(report), *_axes(len(report.layers), low, high, has_outputs=_has_outputs(report))]
    for index, (kind, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [(_x(layer, len(report.layers)), _y(value, low, high)) for layer, value in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        height = _TOP + 14 + 20 * index
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 24}" cy="{height - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(_WIDTH - _RIGHT + 36, height, kind))
    return "\n".join([*parts, "</svg>", ""])


def _series(report: Report) -> dict[str, list[tuple[int, float]]]:
    """Returns kind of matrix → (layer, error), the mean where a layer has several of a kind."""
    sums: dict[str, dict[int, list[float]]] = {}
    key = "output_error" if _has_outputs(report) else "weight_error"
    for index, layer in enumerate(report.layers):
        for matrix in layer["matrices"]:
            if matrix[key] is not None:
                kind = matrix["name"].rpartition(".")[2]
                sums.setdefault(kind, {}).setdefault(index, []).append(matrix[key])
    return {
        kind: [(index, sum(found) / len(found)) for index, found in sorted(layers.items())]
        for kind, layers in sums.items()
    }


def _has_outputs(report: Report) -> bool:
    return any(matrix["output_error"] is not None for layer in report.layers for matrix in layer["matrices"])


def _frame(report: Report) -> Iterator[str]:
    recipe = report.recipe
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="13">'
    )
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    group = "" if report.group_size < 0 else f", groups of {report.group_size}"
    yield _text(_LEFT, 28, f"{report.model_name}: {recipe.scheme} by {recipe.method}{group}", size=17)
    yield _text(_LEFT, 50, "; ".join(report.lines()[:2]), colour="#444")
    if len(report.lines()) > 2:
        yield _text(_LEFT, 68, report.lines()[2], colour="#444")


def _axes(num_layers: int, low: int, high: int, *, has_outputs: bool) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for power in range(low, high + 1):
        y = _y(10.0**power, low, high)
        yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(_LEFT - 8, y + 4, f"{10.0**power:g}", anchor="end")
    yield f'<line x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="black"/>'
    step = max(1, -(-num_layers // 16))
    for layer in range(0, num_layers, step):
        yield _text(_x(layer, num_layers), bottom + 20, str(layer), anchor="middle")
    yield _text((_LEFT + right) / 2, bottom + 42, "layer", anchor="middle")
    what = "outputs" if has_outputs else "weights"
    middle = (_TOP + bottom) / 2
    label = _text(0, 0, f"squared error of the {what}, relative", anchor="middle")
    yield f'<g transform="translate(18 {middle:.0f}) rotate(-90)">{label}</g>'


def _x(layer: int, num_layers: int) -> float:
    width = _WIDTH - _RIGHT - _LEFT
    return _LEFT + width * (layer + 0.5) / num_layers


def _y(value: float, low: int, high: int) -> float:
    share = (math.log10(max(value, _SMALLEST)) - low) / (high - low)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", colour: str = "black") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )
