# SPDX-License-Identifier: Apache-2.0
"""Rounds of a comparison: everybody once in each, in an order that turns round, and what is made of their times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median over rounds, with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sums up the values of the rounds.

        Raises:
            ValueError: there are none.
        """
        listed = list(values)
        if not listed:
            raise ValueError("no rounds, no median")
        return cls(statistics.median(listed), min(listed), max(listed))

    def as_json(self, digits: int = 4) -> dict[str, float]:
        """Returns the three, rounded to so many significant digits."""
        return {name: significant(getattr(self, name), digits) for name in ("median", "low", "high")}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Returns the quotient round by round: what disturbs a round disturbs both.

    Raises:
        ValueError: the rounds are not as many.
    """
    return Spread.of(top / bottom for top, bottom in zip(numerators, denominators, strict=True))


def turns(names: Sequence[str], num_rounds: int) -> Iterator[list[str]]:
    """Yields the order of each round: there, back, there, ... (ABBA), so that a drift favours nobody."""
    for index in range(num_rounds):
        yield list(names) if index % 2 == 0 else list(reversed(names))


def take_turns(measures: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Measures everybody once a round; returns the figures of each by round."""
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for order in turns(list(measures), num_rounds):
        for name in order:
            figures[name].append(measures[name]())
    return figures


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, fitted by least squares; `worst` is the greatest relative distance of a point."""

    intercept: float
    slope: float
    worst: float

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Fits a line.

        Raises:
            ValueError: fewer than two different x.
        """
        if len({x for x, _ in points}) < 2:
            raise ValueError("a line needs two different points")
        mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
        intercept = mean_y - slope * mean_x
        worst = max(abs(intercept + slope * x - y) / abs(y) if y else math.inf for x, y in points)
        return cls(intercept, slope, worst)


def significant(value: float, digits: int = 4) -> float:
    """Rounds to significant digits."""
    return float(f"{value:.{digits}g}")


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns how much of the time axis the intervals (start, end) cover together."""
    total, covered_to = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(end - max(start, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total
