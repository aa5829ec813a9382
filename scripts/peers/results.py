# SPDX-License-Identifier: Apache-2.0
"""The results of bench_peers as JSON lines: one for each engine and case, with the figures of every round.

Rounds of one part and case belong together: the engines took turns in each, so ratios are taken round by round.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What one engine did in one case.

    Attributes:
        part: which part of the benchmark measured it.
        case: NxIxO, or a number of streams.
        seconds: by round: of the case, or of a decoding step, as the part says.
        figures: by round, by name: what else was measured.
        where: machine, versions, commit, time.
    """

    part: str
    engine: str
    case: str
    seconds: list[float]
    figures: dict[str, list[float]] = field(default_factory=dict)
    where: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """A median over rounds, with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Ratio:
        """Sums up the rounds' values."""
        listed = list(values)
        return cls(statistics.median(listed), min(listed), max(listed))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Results:
    """All lines of a file, by part, engine and case."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[tuple[str, str, str], Result] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._put(Result(**json.loads(line)))

    def add(self, results: Iterable[Result]) -> None:
        """Takes what a part has measured, in place of what it measured before, and writes the file."""
        added = list(results)
        again = {(result.part, result.case) for result in added}
        self._lines = {key: one for key, one in self._lines.items() if (one.part, one.case) not in again}
        for result in added:
            self._put(result)
        text = "".join(json.dumps(asdict(result)) + "\n" for result in self._lines.values())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(text, encoding="utf-8")

    def find(self, part: str, engine: str, case: str) -> Result | None:
        """Returns one line, or None where it was not measured."""
        return self._lines.get((part, engine, case))

    def engines(self, part: str) -> list[str]:
        """The engines that were measured in a part, in the order of their first lines."""
        return list(dict.fromkeys(one.engine for one in self._lines.values() if one.part == part))

    def cases(self, part: str) -> list[str]:
        """The cases of a part, in the order of their first lines."""
        return list(dict.fromkeys(one.case for one in self._lines.values() if one.part == part))

    def where(self, part: str) -> dict[str, object]:
        """Where a part was measured; empty if it was not."""
        return next((one.where for one in self._lines.values() if one.part == part), {})

    def _put(self, result: Result) -> None:
        self._lines[result.part, result.engine, result.case] = result


def faster(ours: list[float], theirs: list[float]) -> Ratio:
    """How many times as fast `ours` were, round by round, from seconds."""
    return Ratio.of(their / our for our, their in zip(ours, theirs, strict=True))
