# SPDX-License-Identifier: Apache-2.0
"""One comparison: our operation, its peers, the least time the device needs for it. Checked before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gpu.limits import Limits
from gpu.rounds import Spread, ratio, significant, take_turns
from gpu.timing import Timer

Calls = Sequence[Callable[[], Tensor]]
"""The same work on one set of buffers after the other."""


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
        group, case: names in the results: `decode attention`, `8 x 8192`.
        num_bytes: the least that one call must move; num_flops: that it must compute.
        ours: calls of ours.
        error: distance of a result of the first set from the truth, relative; NaN counts as wrong.
        tolerance: largest error that is right.
        peers: by name, what makes their calls; it raises where a peer cannot be had or cannot do this.
        bar: quotient that we promise, and of what: `limit`, or the name of a peer.
        reset: puts what a call changes in place back to how the first call found it.
    """

    group: str
    case: str
    num_bytes: float
    num_flops: float
    ours: Calls
    error: Callable[[Tensor], float]
    tolerance: float
    peers: dict[str, Callable[[], Calls]] = field(default_factory=dict[str, Callable[[], Calls]])
    bar: tuple[str, float] | None = None
    reset: Callable[[], object] = lambda: None

    def check(self, calls: Calls) -> float:
        """Returns the error of the first of somebody's calls, on the inputs as they were at first."""
        self.reset()
        return self.error(calls[0]())


def run_contest(contest: Contest, timer: Timer, limits: Limits, num_rounds: int) -> dict[str, Any]:
    """Returns the record of a contest. Ours that is wrong is not timed; a peer that fails is named with its reason."""
    record: dict[str, Any] = {"group": contest.group, "case": contest.case}
    record |= {"bytes": contest.num_bytes, "flops": contest.num_flops}
    error = contest.check(contest.ours)
    record["error"] = significant(error)
    if not error <= contest.tolerance:
        return record | {"failed": f"wrong result: relative error {error:.3g}, at most {contest.tolerance:g} is right"}
    measures = {"ours": timer.make(contest.ours)}
    record["in_graph"] = getattr(timer, "was_captured", False)
    peers: dict[str, Any] = {}
    for name, make in contest.peers.items():
        ready = _ready_peer(contest, make, timer)
        if isinstance(ready, str):
            peers[name] = {"unavailable": ready}
        else:
            measures[name] = ready
            peers[name] = {"in_graph": getattr(timer, "was_captured", False)}
    seconds = take_turns(measures, num_rounds)
    return record | _figures(contest, limits, seconds, peers)


def _ready_peer(contest: Contest, make: Callable[[], Calls], timer: Timer) -> Callable[[], float] | str:
    """Returns what measures a peer, or why it cannot be measured."""
    try:
        calls = make()
        error = contest.check(calls)
        if not error <= 2 * contest.tolerance:
            return f"relative error {error:.3g}"
        return timer.make(calls)
    except Exception as reason:  # of a stranger's code: whatever it is, the others go on
        return _first_line(reason)


def _figures(
    contest: Contest, limits: Limits, seconds: dict[str, list[float]], peers: dict[str, Any]
) -> dict[str, Any]:
    least, limit = limits.seconds(contest.num_bytes, contest.num_flops)
    ours = seconds["ours"]
    of_limit = Spread.of(least / second for second in ours)
    for name, theirs in seconds.items():
        if name != "ours":
            faster = ratio(theirs, ours)
            peers[name] |= {"us": _micros(theirs).as_json(), "ours_over_theirs": faster.as_json()}
    figures: dict[str, Any] = {
        "us": _micros(ours).as_json(),
        "limit": limit,
        "limit_us": significant(least * 1e6),
        "of_limit": of_limit.as_json(),
        "peers": peers,
    }
    if contest.bar is not None:
        figures["bar"] = bar_of(contest.bar, of_limit, {n: p.get("ours_over_theirs") for n, p in peers.items()})
    return figures


def bar_of(bar: tuple[str, float], of_limit: Spread, over_peers: dict[str, Any]) -> dict[str, Any]:
    """Returns a promise, what was found, and whether it is kept; None where it could not be measured."""
    of, least = bar
    found = of_limit.median if of == "limit" else (over_peers.get(of) or {}).get("median", math.nan)
    kept = None if math.isnan(found) else found >= least
    return {"of": of, "least": least, "found": None if kept is None else significant(found), "kept": kept}


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Returns |result - expected| / |expected|."""
    expected = expected.double()
    return float((result.double() - expected).norm() / expected.norm())


def _micros(seconds: Sequence[float]) -> Spread:
    return Spread.of(second * 1e6 for second in seconds)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
