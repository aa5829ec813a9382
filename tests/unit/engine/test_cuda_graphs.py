# SPDX-License-Identifier: Apache-2.0
"""Which graphs there are, and which one a step takes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wavetrain_engine.worker.cuda_graphs import CudaRecorder, GraphKey, StepGraphs, graph_keys, padded_sizes


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (33, [1, 2, 4, 8, 16, 24, 32, 33]),
    ],
)
def test_sizes_end_with_the_largest_batch(max_num_seqs: int, sizes: list[int]) -> None:
    assert padded_sizes(max_num_seqs) == sizes


@pytest.mark.parametrize("max_num_seqs", [256, 300, 512, 513, 4000])
def test_there_are_few_and_no_step_is_padded_much(max_num_seqs: int) -> None:
    sizes = padded_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, 512)
    assert len(sizes) <= 52
    assert all(second - first <= max(8, first // 8) for first, second in pairwise(sizes))


def test_the_largest_are_captured_first() -> None:
    keys = graph_keys(4, 2048, query_lens=(1, 5))
    assert [(key.num_rows, key.query_len) for key in keys] == [(4, 5), (2, 5), (1, 5), (4, 1), (2, 1), (1, 1)]
    assert (keys[0].shape.num_tokens, keys[0].shape.num_rows) == (20, 4)


def test_no_graph_is_larger_than_a_step() -> None:
    assert max(key.shape.num_tokens for key in graph_keys(64, 30, query_lens=(1, 4))) <= 30


class TestDispatch:
    def graphs(self, query_lens: tuple[int, ...] = (1,)) -> tuple[StepGraphs, list[GraphKey]]:
        graphs, replayed = StepGraphs(), []
        for key in graph_keys(20, 2048, query_lens):
            graphs.add(key, lambda key=key: replayed.append(key))
        return graphs, replayed

    @pytest.mark.parametrize(("num_rows", "padded"), [(1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 20), (20, 20)])
    def test_the_least_that_holds_the_step(self, num_rows: int, padded: int) -> None:
        graphs, _ = self.graphs()
        assert graphs.key_for(num_rows, num_rows, 1) == GraphKey(padded, 1)

    def test_none_for_more_rows_than_the_largest(self) -> None:
        assert self.graphs()[0].key_for(21, 21, 1) is None

    def test_rows_of_other_lengths_take_others(self) -> None:
        graphs, _ = self.graphs((1, 5))
        assert graphs.key_for(3, 15, 5) == GraphKey(4, 5)
        assert graphs.key_for(3, 12, 4) is None  # nobody verifies three draft tokens here
        assert graphs.key_for(3, 11, 5) is None  # not all rows have five
        assert graphs.key_for(3, 3, 1) == GraphKey(4, 1)

    def test_without_graphs_there_are_no_keys(self) -> None:
        assert StepGraphs().key_for(1, 1, 1) is None
        assert StepGraphs().sizes() == []

    def test_one_can_be_replayed_by_its_size(self) -> None:
        graphs, replayed = self.graphs()
        assert graphs.sizes() == [1, 2, 4, 8, 16, 20]
        graphs.replay(5)
        graphs.run(GraphKey(1, 1))
        assert replayed == [GraphKey(8, 1), GraphKey(1, 1)]


def test_a_failed_capture_comes_back_to_the_stream_it_was_called_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own `graph` stays on the stream of the capture, where it cannot end it."""
    streams = ["ours"]

    @contextmanager
    def stream(name: str) -> Generator[None]:
        before = streams[-1]
        streams.append(name)
        try:
            yield
        finally:
            streams.append(before)

    @contextmanager
    def graph(_graph: Any, **_options: Any) -> Generator[None]:
        streams.append("the capture's")
        try:
            yield
        finally:
            raise RuntimeError("a capture that was cut short")

    def run() -> None:
        if streams[-1] == "the capture's":
            raise RuntimeError("not permitted")

    fakes = {"graph_pool_handle": lambda: (0, 1), "synchronize": lambda: None, "stream": stream, "graph": graph}
    fakes |= {"CUDAGraph": SimpleNamespace, "current_stream": lambda: streams[-1]}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="cut short"):
        CudaRecorder()(run)
    assert streams == ["ours", "ours", "the capture's", "ours"]
