# SPDX-License-Identifier: Apache-2.0
"""What the executor remembers of each request between steps: tokens and block tables, in persistent rows.

A plan brings only differences (new requests, new blocks); the rows hold the rest, so building a step's
inputs is a handful of numpy calls whatever the number of tokens. Device-independent: integers only.

Rows: B = requests of the step, T = tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wavetrain_engine.plan import AdmittedRequest, ScheduledRequest
from wavetrain_engine.sampling_params import SamplingParams

# Columns that block tables have to spare, so that rows which decode need no wider ones for a while.
_SPARE_BLOCKS = 8


@dataclass(slots=True)
class RequestRow:
    """One live request: where its row is, and what does not change from step to step."""

    row: int
    num_prompt_tokens: int
    sampling_params: SamplingParams


@dataclass(slots=True)
class StepInputs:
    """A step's inputs as host arrays. They belong to the batch, which moves them on in the steps that follow.

    Attributes:
        rows: [B] row of each scheduled request.
        token_ids, positions: [T] int64.
        slot_mapping: [T] int64 KV slots the tokens are written to.
        query_start_loc: [B + 1] int32 where each request's tokens start in [T].
        seq_lens: [B] int32 context after this step.
        block_tables: [B, longest or more] int32, padded with block 0.
        max_query_len, max_seq_len: the largest of the step; 0 in an empty one.
    """

    rows: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    max_query_len: int
    max_seq_len: int


class InputBatch:
    """Rows of the live requests. Rows are reused; a request keeps its row until it is removed."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        # Surplus rows of a step in flight fit too: the scheduler plans none past a request's last token.
        max_blocks = -(-max_model_len // block_size)
        # np.zeros maps pages on first touch, so long contexts cost memory only where they are used.
        self._token_ids = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._requests: dict[str, RequestRow] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._inputs: StepInputs | None = None  # the last step's, while its rows are the same requests still
        self._request_ids: list[str] = []  # and theirs

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __getitem__(self, request_id: str) -> RequestRow:
        return self._requests[request_id]

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: AdmittedRequest) -> RequestRow:
        """Gives the request a row with its tokens and blocks."""
        row = self._free_rows.pop()
        self._inputs = None
        num_tokens, num_blocks = len(request.token_ids), len(request.block_ids)
        self._token_ids[row, :num_tokens] = request.token_ids
        self._num_tokens[row] = num_tokens
        # A reused row holds another's ids beyond its own; block 0 is always a valid address.
        self._block_tables[row, num_blocks : self._num_blocks[row]] = 0
        self._block_tables[row, :num_blocks] = request.block_ids
        self._num_blocks[row] = num_blocks
        entry = RequestRow(
            row=row,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling_params=request.sampling_params,
        )
        self._requests[request.request_id] = entry
        return entry

    def remove(self, request_id: str) -> RequestRow | None:
        """Frees the request's row. Returns what it was, or None for an unknown id."""
        entry = self._requests.pop(request_id, None)
        if entry is not None:
            self._inputs = None
            self._free_rows.append(entry.row)
        return entry

    def append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        """Adds blocks to the end of a row's block table."""
        start = self._num_blocks[row]
        self._block_tables[row, start : start + len(block_ids)] = block_ids
        self._num_blocks[row] = start + len(block_ids)

    def append_tokens(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Adds one sampled token to each of the (distinct) rows."""
        positions = self._num_tokens[rows]
        self._token_ids[rows, positions] = token_ids
        self._num_tokens[rows] = positions + 1

    def prompt_targets(self, row: int, start: int, end: int) -> NDArray[np.int64]:
        """Tokens start + 1 … end of a row: what positions [start, end) should predict."""
        return self._token_ids[row, start + 1 : end + 1].astype(np.int64)

    def inputs(self, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
        """Builds the step's inputs in the plan's order, after applying its new blocks; valid until the next call.

        Requests that all decode again, as most steps are, get the last step's arrays, moved on by one token.
        """
        for item in scheduled:
            if item.new_block_ids:
                self.append_blocks(self._requests[item.request_id].row, item.new_block_ids)
        request_ids = [item.request_id for item in scheduled]
        counts = [item.num_scheduled_tokens for item in scheduled]
        last = self._inputs
        is_advance = (
            last is not None
            and last.max_query_len == 1
            and last.max_seq_len < last.block_tables.shape[1] * self._block_size
            and max(counts, default=0) == 1
            and request_ids == self._request_ids
        )
        if last is not None and is_advance:
            self._advance(last)
            return last
        self._inputs = self._gather(request_ids, [item.num_computed_tokens for item in scheduled], counts)
        self._request_ids = request_ids
        return self._inputs

    def _gather(self, request_ids: list[str], computed: list[int], scheduled: list[int]) -> StepInputs:
        rows = np.asarray([self._requests[request_id].row for request_id in request_ids], dtype=np.int64)
        starts, counts = np.asarray(computed, dtype=np.int64), np.asarray(scheduled, dtype=np.int64)
        query_start_loc = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        num_tokens = int(query_start_loc[-1])
        offsets = np.arange(num_tokens, dtype=np.int64) - np.repeat(query_start_loc[:-1].astype(np.int64), counts)
        positions = np.repeat(starts, counts) + offsets
        token_rows = np.repeat(rows, counts)
        seq_lens = starts + counts
        max_seq_len = int(seq_lens.max(initial=0))
        num_columns = min(-(-max_seq_len // self._block_size) + _SPARE_BLOCKS, self._block_tables.shape[1])
        block_ids = self._block_tables[token_rows, positions // self._block_size].astype(np.int64)
        return StepInputs(
            rows=rows,
            token_ids=self._token_ids[token_rows, positions].astype(np.int64),
            positions=positions,
            slot_mapping=block_ids * self._block_size + positions % self._block_size,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens.astype(np.int32),
            block_tables=self._block_tables[rows, :num_columns],
            max_query_len=max(scheduled, default=0),
            max_seq_len=max_seq_len,
        )

    def _advance(self, inputs: StepInputs) -> None:
        """Moves rows of one token each on to the next one."""
        positions = inputs.positions
        positions += 1
        inputs.seq_lens += 1
        inputs.slot_mapping += 1
        inputs.max_seq_len += 1
        entering = np.flatnonzero(positions % self._block_size == 0)  # rows whose token is the first of a block
        if entering.size:
            columns = positions[entering] // self._block_size
            block_ids = self._block_tables[inputs.rows[entering], columns]
            inputs.block_tables[entering, columns] = block_ids
            inputs.slot_mapping[entering] = block_ids.astype(np.int64) * self._block_size
        inputs.token_ids[:] = self._token_ids[inputs.rows, positions]
