# SPDX-License-Identifier: Apache-2.0
"""How long work takes on the device: replays of a captured graph between two events, over buffers that rotate.

A graph leaves out what a launch costs the host, as serving does. Each call of a graph works on buffers of its own, more
than the second-level cache holds together, so that every call finds its inputs in memory, as a layer does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# Rotating buffers take at least this much: twice the H200's second-level cache (60 MB as torch reports it).
_ROTATE_BYTES = 128 * 10**6
_MAX_SETS = 512
# One figure is of at least so much work on the device: events tell half a microsecond.
_LEAST_S = 0.02
_MAX_REPLAYS = 2000


class Timer(Protocol):
    """Turns calls into a function that returns seconds for one of them."""

    device: torch.device

    def make(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        """Makes ready (compiles, captures); the function measures once each time it is called."""
        ...


def num_sets(set_bytes: int, device: torch.device) -> int:
    """Returns how many sets of buffers of that size to rotate through; two on a CPU, where nothing is timed."""
    if device.type == "cpu":
        return 2
    return max(2, min(_MAX_SETS, -(-_ROTATE_BYTES // max(set_bytes, 1))))


@dataclass
class GraphTimer:
    """Times on a GPU. What cannot be captured is launched as it is, and `was_captured` says so."""

    device: torch.device
    was_captured: bool = True

    def make(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        """See Timer."""
        for call in calls[:2]:  # compiles, and makes libraries choose
            call()
        torch.cuda.synchronize(self.device)
        replay = self._capture(calls)
        replay()
        seconds = self._time(replay, 1)
        num_replays = max(1, min(_MAX_REPLAYS, round(_LEAST_S / max(seconds, 1e-7))))
        return lambda: self._time(replay, num_replays) / len(calls)

    def _capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        self.was_captured = True
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one comes back to our stream also where a capture fails: torch's own would not.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            self.was_captured = False
            return lambda: [call() for call in calls]
        return graph.replay

    def _time(self, replay: Callable[[], object], num_replays: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(num_replays):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / num_replays


@dataclass
class HostTimer:
    """Stands in for the device in a dry run: every call is made once, and its time means nothing."""

    device: torch.device
    was_captured: bool = False

    def make(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        """See Timer."""
        calls[0]()
        return lambda: self._time(calls)

    def _time(self, calls: Sequence[Callable[[], object]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
