# SPDX-License-Identifier: Apache-2.0
"""The runner of a GPU on a CPU: an engine whose tables and steps are a device's, with the reference kernels.

Graphs are fakes that run the captured function again. Two things tell them from real ones, and are made up for: the
reference reads lengths on the host, where a graph has the longest for all, so the model is made to read them from the
tensors; and a real graph keeps addresses, so the tensors that the model gets are checked to be at the captured ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from fakes.real_core import RealCore
from wavetrain_engine.models.llama import Llama
from wavetrain_engine.worker import device_start, load
from wavetrain_engine.worker.cuda_graphs import StepGraphs
from wavetrain_engine.worker.executor import DeviceExecutor
from wavetrain_kernels.ops import AttentionMetadata


class FakeRecorder:
    """Runs twice what it captures, as a real one does: once to warm up, once to record.

    Attributes:
        check: whether the model tells where its inputs are.
    """

    def __init__(self) -> None:
        self.check = True
        self.num_replays = 0
        self._addresses: list[tuple[int, ...]] = []

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self._addresses.clear()
        run()
        run()
        expected = self._addresses[-1:]
        assert self._addresses == expected * 2 or not self.check

        def replay() -> None:
            self.num_replays += 1
            self._addresses.clear()
            run()
            assert self._addresses == expected or not self.check

        return replay

    def see(self, *tensors: Tensor) -> None:
        """Notes where the inputs of the model are."""
        self._addresses.append(tuple(tensor.data_ptr() for tensor in tensors))


def device_on_cpu(monkeypatch: pytest.MonkeyPatch, *, with_graphs: bool) -> FakeRecorder:
    """Has every engine that is loaded from now on take its CPU for a device."""
    recorder = FakeRecorder()
    monkeypatch.setenv("WAVETRAIN_KERNELS", "reference")
    monkeypatch.setattr(load, "_is_device_resident", lambda _device: True)
    monkeypatch.setattr(device_start, "_recorder", lambda _config, _facts: recorder if with_graphs else None)
    forward = Llama.forward

    def read_lengths(self: Llama, ids: Tensor, positions: Tensor, caches: Any, metadata: AttentionMetadata) -> Tensor:
        recorder.see(positions, metadata.slot_mapping, metadata.seq_lens, metadata.block_tables)
        query_lens = metadata.query_start_loc.diff()
        seq_lens = metadata.seq_lens.maximum(query_lens)  # padding has a context of nothing
        metadata = AttentionMetadata.build(
            query_lens.tolist(), seq_lens.tolist(), metadata.block_tables, metadata.slot_mapping
        )
        return forward(self, ids, positions, caches, metadata)

    if with_graphs:
        monkeypatch.setattr(Llama, "forward", read_lengths)
    return recorder


def graphs_of(core: RealCore) -> StepGraphs | None:
    """The graphs of a core that takes its CPU for a device."""
    assert isinstance(core.executor, DeviceExecutor)
    assert core.executor.runner is not None
    return core.executor.runner.graphs
