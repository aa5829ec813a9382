# SPDX-License-Identifier: Apache-2.0
"""Which tokens each penalized row has seen, and how often in its output: kept on the device, one update a step.

Only the distinct tokens of a row are held, not a count per vocabulary entry: a penalty then costs what the row's
length costs, and rows without penalties cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST_CAPACITY = 256
_FIRST_SLOTS = 8


@dataclass(frozen=True, slots=True)
class _Row:
    """One row's place in the table: its slot, and the column of each token it has seen."""

    slot: int
    columns: dict[int, int] = field(default_factory=dict[int, int])


class PenaltyTable:
    """Distinct tokens and output counts of the rows that have penalties. Both tensors grow as needed."""

    def __init__(self, device: torch.device) -> None:
        self._rows: dict[int, _Row] = {}
        self._free_slots: list[int] = list(range(_FIRST_SLOTS))
        self._token_ids = torch.zeros((_FIRST_SLOTS, _FIRST_CAPACITY), dtype=torch.int64, device=device)
        self._output_counts = torch.zeros((_FIRST_SLOTS, _FIRST_CAPACITY), dtype=torch.int32, device=device)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(self, row: int, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Starts to count for a row that is not in the table; `token_ids`, its prompt and output, is not empty."""
        if not self._free_slots:
            num_slots = self._token_ids.shape[0]
            self._grow(num_slots * 2, self._token_ids.shape[1])
            self._free_slots = list(range(num_slots, num_slots * 2))
        entry = self._rows[row] = _Row(self._free_slots.pop())
        for token_id in token_ids:
            entry.columns.setdefault(token_id, len(entry.columns))
        self._make_room(len(entry.columns))
        counts = dict.fromkeys(entry.columns, 0)
        for token_id in token_ids[num_prompt_tokens:]:
            counts[token_id] += 1
        num_distinct = len(counts)
        device = self._token_ids.device
        self._token_ids[entry.slot, :num_distinct] = torch.tensor(list(counts), dtype=torch.int64, device=device)
        self._output_counts[entry.slot] = 0  # columns to come start from none, whoever had the slot before
        self._output_counts[entry.slot, :num_distinct] = torch.tensor(
            list(counts.values()), dtype=torch.int32, device=device
        )

    def remove(self, row: int) -> None:
        """Forgets a row; one that is not in the table is no error."""
        entry = self._rows.pop(row, None)
        if entry is not None:
            self._free_slots.append(entry.slot)

    def append(self, rows: list[int], token_ids: list[int]) -> None:
        """Counts one output token for each of the rows, all in the table; a row may come more than once."""
        slots: list[int] = []
        columns: list[int] = []
        for row, token_id in zip(rows, token_ids, strict=True):
            entry = self._rows[row]
            column = entry.columns.get(token_id)
            if column is None:
                column = entry.columns[token_id] = len(entry.columns)
            slots.append(entry.slot)
            columns.append(column)
        self._make_room(max(columns, default=0) + 1)
        device = self._token_ids.device
        where = (torch.tensor(slots, device=device), torch.tensor(columns, device=device))
        self._token_ids[where] = torch.tensor(token_ids, dtype=torch.int64, device=device)
        one = torch.ones(len(slots), dtype=torch.int32, device=device)
        self._output_counts.index_put_(where, one, accumulate=True)

    def select(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Returns (token_ids, output_counts) of the rows as `ops.apply_penalties` takes them, [len(rows), L] each."""
        device = self._token_ids.device
        entries = [self._rows[row] for row in rows]
        lengths = [len(entry.columns) for entry in entries]
        slots = torch.tensor([entry.slot for entry in entries], device=device)
        last = torch.tensor(lengths, device=device)[:, None] - 1
        columns = torch.minimum(torch.arange(max(lengths), device=device)[None, :], last)
        width = max(lengths)
        return (
            self._token_ids[:, :width].index_select(0, slots).gather(1, columns),
            self._output_counts[:, :width].index_select(0, slots).gather(1, columns),
        )

    def _make_room(self, num_columns: int) -> None:
        if num_columns > self._token_ids.shape[1]:
            self._grow(self._token_ids.shape[0], max(num_columns, 2 * self._token_ids.shape[1]))

    def _grow(self, num_slots: int, num_columns: int) -> None:
        old_slots, old_columns = self._token_ids.shape
        token_ids = self._token_ids.new_zeros((num_slots, num_columns))
        output_counts = self._output_counts.new_zeros((num_slots, num_columns))
        token_ids[:old_slots, :old_columns] = self._token_ids
        output_counts[:old_slots, :old_columns] = self._output_counts
        self._token_ids, self._output_counts = token_ids, output_counts
