# SPDX-License-Identifier: Apache-2.0
"""The tokens of the rows that look back on them (penalties, bad words), kept on the device.

What a step samples is written here from where it was sampled: the host learns of it later, so a step can be launched
before the one before it has come back. Rows that do not look back cost nothing; one that does, its tokens and a count
for each entry of the vocabulary. Everything runs in the order of the device's stream, which a slot that is given to
another row relies on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wavetrain_engine.sampling.upload import upload, upload_ints

_FIRST_CAPACITY = 256
_FIRST_SLOTS = 8

# S = slots, C = most tokens of a row, V = vocabulary, P = rows asked about, L = tokens of the longest of them.


class TokenTable:
    """Tokens [S, C] of some rows, and how often each token is in their output [S, V]. Both grow as needed."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._slots: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._tokens = torch.zeros((0, _FIRST_CAPACITY), dtype=torch.int64, device=device)
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)

    def __contains__(self, row: int) -> bool:
        return row in self._slots

    def add(self, row: int, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Starts to keep the tokens of a row that is not in the table: its prompt and output so far."""
        if not self._free_slots:
            num_slots = self._tokens.shape[0]
            more = max(_FIRST_SLOTS, num_slots)
            self._grow(num_slots + more, self._tokens.shape[1])
            self._free_slots = list(range(num_slots, num_slots + more))
        slot = self._slots[row] = self._free_slots.pop()
        self.make_room(len(token_ids))
        tokens = upload_ints(token_ids, self._device)
        self._tokens[slot, : len(token_ids)] = tokens
        self._counts[slot] = 0
        output = tokens[num_prompt_tokens:]
        if output.shape[0]:
            self._counts[slot].scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def remove(self, row: int) -> None:
        """Forgets a row; one that is not in the table is no error."""
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free_slots.append(slot)

    def slots(self, rows: list[int]) -> Tensor:
        """Returns where the rows, all in the table, are kept, int64 on the device."""
        return upload(np.asarray([self._slots[row] for row in rows], dtype=np.int64), self._device)

    def make_room(self, num_tokens: int) -> None:
        """Lets every row have at least so many tokens."""
        if num_tokens > self._tokens.shape[1]:
            self._grow(self._tokens.shape[0], max(num_tokens, 2 * self._tokens.shape[1]))

    def append(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Writes output tokens at positions that there is room for, and counts them; a slot may come more than once."""
        self._tokens[slots, positions] = token_ids
        one = torch.ones_like(token_ids, dtype=torch.int32)
        self._counts.view(-1).scatter_add_(0, slots * self._counts.shape[1] + token_ids, one)

    def select(self, slots: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Returns (token_ids, output_counts) [P, longest] as `ops.apply_penalties` takes them; lengths [P] > 0."""
        columns = torch.arange(longest, device=self._device)
        columns = torch.minimum(columns[None, :], lengths[:, None] - 1)
        token_ids = self._tokens[:, :longest].index_select(0, slots).gather(1, columns)
        return token_ids, self._counts.view(-1).take(slots[:, None] * self._counts.shape[1] + token_ids)

    def at(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Returns the tokens at some positions of some slots, of the shape that the two have together."""
        return self._tokens[slots, positions]

    def _grow(self, num_slots: int, capacity: int) -> None:
        old_slots, old_capacity = self._tokens.shape
        tokens = self._tokens.new_zeros((num_slots, capacity))
        tokens[:old_slots, :old_capacity] = self._tokens
        self._tokens = tokens
        if num_slots > old_slots:
            counts = self._counts.new_zeros((num_slots, self._counts.shape[1]))
            counts[:old_slots] = self._counts
            self._counts = counts
