# SPDX-License-Identifier: Apache-2.0
"""The rows of the live requests on a device: a copy of the input batch's tables, and the numbers of one step.

The host knows every number of a step before it starts, but for the ids of tokens that the step before it is still
sampling. So ids stay on the device: the sampler's tokens are put into the table there, and a step picks its tokens from
the table. Everything else travels, in one copy from pinned memory: the step's numbers, and which cells of the tables
are new. Works on any device that torch has; on a CPU for tests.

T = tokens of the step, B = its rows, N = those of them that sample; padded where a captured graph runs the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wavetrain_engine.plan import AdmittedRequest
from wavetrain_engine.worker.input_batch import InputBatch, RequestRow, StepInputs

# Words of the static buffer for cells of the tables that are new: more than decoding rows need for their blocks.
_WORDS_FOR_CHANGES = 4096


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many tokens and rows the tensors of a step have: T and B."""

    num_tokens: int
    num_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class StepNumbers:
    """A step's numbers as views of one buffer of 64-bit words: arrays on the host, tensors on the device.

    What pads a step does no harm: the cell of some token, position 0, slot -1, row 0, an empty context.

    Attributes:
        token_cells: [T] int64, where each token is in the table of token ids.
        positions, slot_mapping: [T] int64.
        rows: [B] int64, each row's place in the tables.
        sampling_tokens: [B] int64; its first N entries: the last token of each sampling row, among the T.
        next_cells: [B] int64; its first N entries: where the sampled token of each goes in the table.
        query_start_loc: [B + 1] int32.
        seq_lens: [B] int32.
    """

    token_cells: Any
    positions: Any
    slot_mapping: Any
    rows: Any
    sampling_tokens: Any
    next_cells: Any
    query_start_loc: Any
    seq_lens: Any

    @classmethod
    def lay_out(cls, words: Any, shape: StepShape, int32: Any) -> StepNumbers:
        """Returns the views, which begin at multiples of 16 bytes: kernels are compiled for that."""
        parts: list[Any] = []
        start = 0
        for length in (*[shape.num_tokens] * 3, *[shape.num_rows] * 3):
            parts.append(words[start : start + length])
            start += _even(length)
        for length in (shape.num_rows + 1, shape.num_rows):
            num_words = _even(-(-length // 2))
            parts.append(words[start : start + num_words].view(int32)[:length])
            start += num_words
        return cls(*parts)

    @staticmethod
    def num_words(shape: StepShape) -> int:
        """Returns what `lay_out` needs."""
        num_int32_words = _even(-(-(shape.num_rows + 1) // 2)) + _even(-(-shape.num_rows // 2))
        return 3 * _even(shape.num_tokens) + 3 * _even(shape.num_rows) + num_int32_words


class _Table:
    """A host table and its copy on the device, which is brought up to date by ranges of cells."""

    def __init__(self, host: NDArray[np.int32], device: torch.device) -> None:
        self._cells = host.reshape(-1)
        self._width = host.shape[1]
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self.tensor = torch.zeros(host.shape, dtype=torch.int32, device=device)
        self.flat = self.tensor.view(-1)

    def note(self, row: int, start: int, length: int) -> None:
        """The host has new values in columns [start, start + length) of a row."""
        self._starts.append(row * self._width + start)
        self._lengths.append(length)

    @property
    def num_changes(self) -> int:
        """Cells noted since they were last taken."""
        return sum(self._lengths)

    def take_changes(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Returns the cells noted since the last call, and what is in them now."""
        if not self._starts:
            return _NO_CELLS, _NO_VALUES
        starts, lengths = np.asarray(self._starts, dtype=np.int64), np.asarray(self._lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        cells = np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1], dtype=np.int64)
        self._starts.clear()
        self._lengths.clear()
        return cells, self._cells[cells]

    def write(self, cells: Tensor, values: Tensor) -> None:
        """Brings cells of the device's table up to date."""
        if cells.shape[0]:
            self.flat.index_copy_(0, cells, values)


_NO_CELLS, _NO_VALUES = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)


class DeviceBatch(InputBatch):
    """An input batch whose tables are on a device too.

    Args:
        static_shape: the largest step that runs as a captured graph, whose inputs must always be at one address.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, static_shape: StepShape, device: torch.device
    ) -> None:
        super().__init__(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size)
        self.device = device
        self.max_model_len = max_model_len
        self._token_table = _Table(self._token_ids, device)
        self._block_table = _Table(self._block_tables, device)
        num_static_words = StepNumbers.num_words(static_shape) + _WORDS_FOR_CHANGES
        self._static_words = torch.zeros(num_static_words, dtype=torch.int64, device=device)
        self._static_numbers: dict[StepShape, StepNumbers] = {}
        # Where the block tables of a step's rows are put together; steps follow each other, so one is enough.
        shape = (max(max_num_seqs, static_shape.num_rows), self._block_tables.shape[1])
        self._step_tables = torch.zeros(shape, dtype=torch.int32, device=device)

    def add(self, request: AdmittedRequest) -> RequestRow:
        """See InputBatch."""
        entry = super().add(request)
        self._token_table.note(entry.row, 0, len(request.token_ids))
        self._block_table.note(entry.row, 0, len(request.block_ids))
        return entry

    def append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        """See InputBatch."""
        start = int(self._num_blocks[row])
        super().append_blocks(row, block_ids)
        self._block_table.note(row, start, len(block_ids))

    def static_numbers(self, shape: StepShape) -> StepNumbers:
        """Returns where `send` puts the numbers of a static step."""
        numbers = self._static_numbers.get(shape)
        if numbers is None:
            numbers = self._static_numbers[shape] = StepNumbers.lay_out(self._static_words, shape, torch.int32)
        return numbers

    def fits_static(self, shape: StepShape) -> bool:
        """Whether the next step could be static: its numbers, and all that is new in the tables, have room."""
        return self._num_words(shape) <= self._static_words.shape[0]

    def send(self, inputs: StepInputs, sampling: list[int], shape: StepShape, *, is_static: bool) -> StepNumbers:
        """Brings a step's numbers and the tables' new cells to the device, without waiting for it.

        Args:
            sampling: the rows that sample, among the step's.
            shape: the step's own, or larger: padded.
            is_static: put the numbers where `static_numbers` says, after `fits_static`; otherwise anywhere.
        """
        # From the allocator of pinned memory, which gives it to nobody else before the device has copied it.
        host = torch.empty(self._num_words(shape), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        words = host.numpy()
        self._fill(StepNumbers.lay_out(words, shape, np.int32), inputs, sampling)
        start = StepNumbers.num_words(shape)
        token_cells, token_ids = self._token_table.take_changes()
        block_cells, block_ids = self._block_table.take_changes()
        num_token_cells, num_cells = len(token_cells), len(token_cells) + len(block_cells)
        words[start : start + num_cells] = np.concatenate((token_cells, block_cells))
        words[start + num_cells :].view(np.int32)[:num_cells] = np.concatenate((token_ids, block_ids))
        if is_static:
            device = self._static_words[: host.shape[0]]
            device.copy_(host, non_blocking=True)
        else:
            device = host.to(self.device, non_blocking=True)
        if num_cells:
            cells, values = device[start : start + num_cells], device[start + num_cells :].view(torch.int32)[:num_cells]
            self._token_table.write(cells[:num_token_cells], values[:num_token_cells])
            self._block_table.write(cells[num_token_cells:], values[num_token_cells:])
        return self.static_numbers(shape) if is_static else StepNumbers.lay_out(device, shape, torch.int32)

    def gather(self, numbers: StepNumbers) -> tuple[Tensor, Tensor]:
        """Returns the token ids [T] int64 and block tables [B, max_blocks] int32 of a step; for a graph to capture."""
        token_ids = self._token_table.flat.index_select(0, numbers.token_cells).to(torch.int64)
        block_tables = self._step_tables[: numbers.rows.shape[0]]
        torch.index_select(self._block_table.tensor, 0, numbers.rows, out=block_tables)
        return token_ids, block_tables

    def append_on_device(self, numbers: StepNumbers, token_ids: Tensor) -> None:
        """Puts the sampled tokens [N] int64 behind those of their rows."""
        self._token_table.flat.index_copy_(0, numbers.next_cells[: token_ids.shape[0]], token_ids.to(torch.int32))

    def _num_words(self, shape: StepShape) -> int:
        num_cells = self._token_table.num_changes + self._block_table.num_changes
        return StepNumbers.num_words(shape) + num_cells + -(-num_cells // 2)

    def _fill(self, numbers: StepNumbers, inputs: StepInputs, sampling: list[int]) -> None:
        rows, starts, seq_lens = inputs.rows, inputs.query_start_loc, inputs.seq_lens
        num_tokens, num_rows = len(inputs.positions), len(rows)
        token_rows = rows if num_tokens == num_rows else np.repeat(rows, np.diff(starts))
        numbers.token_cells[:num_tokens] = token_rows * self.max_model_len + inputs.positions
        numbers.token_cells[num_tokens:] = 0
        numbers.positions[:num_tokens] = inputs.positions
        numbers.positions[num_tokens:] = 0
        numbers.slot_mapping[:num_tokens] = inputs.slot_mapping
        numbers.slot_mapping[num_tokens:] = -1
        numbers.rows[:num_rows] = rows
        numbers.rows[num_rows:] = 0
        numbers.seq_lens[:num_rows] = seq_lens
        numbers.seq_lens[num_rows:] = 0
        numbers.query_start_loc[: num_rows + 1] = starts
        num_padding_rows = len(numbers.rows) - num_rows
        if num_padding_rows:  # as many tokens as the others have
            query_len = len(numbers.positions) // len(numbers.rows)
            padding = np.arange(1, num_padding_rows + 1) * query_len
            numbers.query_start_loc[num_rows + 1 :] = num_tokens + padding
        ends, next_cells = starts[1:] - 1, rows * self.max_model_len + seq_lens
        if len(sampling) < num_rows:
            ends, next_cells = ends[sampling], next_cells[sampling]
        numbers.sampling_tokens[: len(sampling)] = ends
        numbers.next_cells[: len(sampling)] = next_cells


def _even(number: int) -> int:
    return number + number % 2
