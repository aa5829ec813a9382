# SPDX-License-Identifier: Apache-2.0
"""Recorded calls of the compiled kernels, run as one: see source/program.h."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.cpu.memory import huge_zeros
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.wanted_tokens import WantedTokens


class _Step(ctypes.Structure):
    """`Step` of source/program.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


class CpuProgram:
    """A `Program` of the compiled kernels.

    Args:
        capacity: the most tokens of a step.
    """

    def __init__(self, library: Library, capacity: int) -> None:
        self._library = library
        self._handle: int = library.program_new(capacity)
        weakref.finalize(self, library.program_free, self._handle)
        self._arena = _Arena()
        self._num_scratch_bytes = 0
        self._stages = (_Step * 2)()
        self._all_tokens = torch.arange(capacity)
        self._scratch: Tensor | None = None

    @contextmanager
    def record(self) -> Generator[None]:
        """See Program."""
        with self._library.recorded_by(self, self._handle):
            yield
        if not self._library.program_is_sound(self._handle):
            raise UnsupportedDevice("a call that is not over the tokens of a step cannot be recorded")
        self._scratch = huge_zeros((self._num_scratch_bytes,), torch.uint8)
        for stage in self._stages:
            stage.workspace = self._scratch.data_ptr()

    def run(
        self, token_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, wanted: WantedTokens | None = None
    ) -> None:
        """See Program."""
        if wanted is None:
            wanted = WantedTokens(self._all_tokens[: token_ids.shape[0]], metadata)
        _fill(self._stages[0], token_ids, metadata)
        self._stages[0].positions = positions.data_ptr()
        _fill(self._stages[1], wanted.indices, wanted.metadata)
        self._library.program_run(self._handle, ctypes.byref(self._stages))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Recorder."""
        return self._arena.empty(shape, dtype)

    def scratch(self, num_bytes: int) -> None:
        """See Recorder."""
        self._num_scratch_bytes = max(self._num_scratch_bytes, num_bytes)


def _fill(stage: _Step, token_ids: Tensor, metadata: AttentionMetadata) -> None:
    stage.num_tokens = token_ids.shape[0]
    stage.num_rows = metadata.num_requests
    stage.table_stride = metadata.block_tables.stride(0)
    stage.token_ids = token_ids.data_ptr()
    stage.slots = metadata.slot_mapping.data_ptr()
    stage.query_start_loc = metadata.query_start_loc.data_ptr()
    stage.seq_lens = metadata.seq_lens.data_ptr()
    stage.block_tables = metadata.block_tables.data_ptr()


class _Arena:
    """Memory that stays, for tensors that come and go while a program is recorded.

    What a dropped tensor had is given to a later one: calls run in the order they were recorded in, so nobody reads it
    any more by then. A few buffers thus serve all layers and stay in the cache.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = max(math.prod(shape) * dtype.itemsize, 1)
        block = min(
            (block for block in self._free if block.shape[0] >= num_bytes),
            key=lambda block: block.shape[0],
            default=None,
        )
        if block is None:
            block = huge_zeros((num_bytes,), torch.uint8)
            self._blocks.append(block)
        else:
            self._free = [other for other in self._free if other is not block]
        # The storage of the tensor and of all its views holds the lease; with the last of them it is given back.
        lease = (ctypes.c_uint8 * num_bytes).from_address(block.data_ptr())
        weakref.finalize(lease, self._free_block, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=math.prod(shape)).view(*shape)

    def _free_block(self, block: Tensor) -> None:
        self._free.append(block)
