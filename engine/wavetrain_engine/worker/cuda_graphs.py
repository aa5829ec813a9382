# SPDX-License-Identifier: Apache-2.0
"""Captured steps: which sizes there are, which one a step takes, and how a graph is captured.

A graph has fixed shapes, so a step runs in the graph of the least size that holds it, padded with rows that do nothing.
Only steps whose rows all have equally many tokens are captured: one each when they decode, 1 + k when they verify k
draft tokens. Any other step runs layer by layer, and has enough to compute to hide what launching that costs.
"""

from __future__ import annotations

import gc
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from wavetrain_engine.worker.device_batch import StepShape

# Rows of the largest graph: beyond it a step computes for longer than it takes to launch.
_MOST_ROWS = 512

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], None]], Replay]
"""Captures what a function does on the device, and returns what does it again."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Which graph: a number of rows, and of tokens that each of them has."""

    num_rows: int
    query_len: int

    @property
    def shape(self) -> StepShape:
        """What its tensors are made for."""
        return StepShape(num_tokens=self.num_rows * self.query_len, num_rows=self.num_rows)


def padded_sizes(max_num_seqs: int) -> list[int]:
    """Returns the numbers of rows that are captured, up to the first that holds `max_num_seqs`, or to the most.

    Small batches pay for padding most, so their sizes are close together.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, _MOST_ROWS + 1, 16)]
    largest = min(max_num_seqs, _MOST_ROWS)
    return [*(size for size in sizes if size < largest), largest]


def graph_keys(max_num_seqs: int, max_num_batched_tokens: int, query_lens: Iterable[int] = (1,)) -> list[GraphKey]:
    """Returns the graphs to capture, the largest first: the others then find their memory in what it has freed."""
    keys = [
        GraphKey(num_rows, query_len)
        for query_len in query_lens
        for num_rows in padded_sizes(min(max_num_seqs, max_num_batched_tokens // query_len))
    ]
    return sorted(keys, key=lambda key: key.shape.num_tokens, reverse=True)


class StepGraphs:
    """The captured steps by key. What they read and write is theirs who captured them."""

    def __init__(self) -> None:
        self._replays: dict[GraphKey, Replay] = {}
        self._num_rows: dict[int, list[int]] = {}  # by query_len, in order

    def add(self, key: GraphKey, replay: Replay) -> None:
        """Takes in what a Recorder returned for a step."""
        self._replays[key] = replay
        insort(self._num_rows.setdefault(key.query_len, []), key.num_rows)

    def key_for(self, num_rows: int, num_tokens: int, max_query_len: int) -> GraphKey | None:
        """Returns the least graph that holds a step; None: its rows differ in their tokens, or are too many."""
        sizes = self._num_rows.get(max_query_len, [])
        if num_tokens != num_rows * max_query_len or not sizes or num_rows > sizes[-1]:
            return None
        return GraphKey(sizes[bisect_left(sizes, num_rows)], max_query_len)

    def run(self, key: GraphKey) -> None:
        """Replays a graph on the current stream, without waiting for it."""
        self._replays[key]()

    def sizes(self, query_len: int = 1) -> list[int]:
        """Returns the numbers of rows there are graphs for."""
        return list(self._num_rows.get(query_len, []))

    def replay(self, num_rows: int) -> None:
        """Replays the decode graph of the least size that holds so many rows, with whatever lies in its inputs."""
        self.run(GraphKey(next(size for size in self.sizes() if size >= num_rows), 1))


class CudaRecorder:
    """Captures CUDA graphs into one pool of memory: they are never replayed at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        """See Recorder."""
        run()  # what is compiled, allocated or looked up the first time does not belong in a graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The outer one comes back to our stream also where a capture fails: torch's own would leave us on the other.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


@contextmanager
def collector_at_rest() -> Generator[None]:
    """Keeps the garbage collector from what is there already: capturing collects each time, and frees nothing."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
