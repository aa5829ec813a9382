# SPDX-License-Identifier: Apache-2.0
"""Where each token of a step sits in the batch and in the paged KV cache. Built once a step, read by every layer."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError

# B = requests in the step, T = tokens in the step.


@dataclass(eq=False)
class AttentionMetadata:
    """The layout of one step. Rows may mix single-token decodes and chunks of prompts, in any order.

    Nothing in it changes while the step runs; between two steps `advance` may turn it into the next one's.

    Attributes:
        query_start_loc: [B + 1] int32; row b's tokens are [query_start_loc[b], query_start_loc[b + 1]) of the T.
        seq_lens: [B] int32; tokens of row b's context including this step's. Row b's queries are its last ones.
        block_tables: [B, max_blocks] int32; entries past a row's last block may be any valid id (0, say).
        slot_mapping: [T] int64; where each token's key and value go: block_id * block_size + offset; -1: nowhere.
        max_query_len: most queries of a row; 0 in an empty step.
        max_seq_len: longest context of a row; 0 in an empty step.
        host_query_start_loc, host_seq_lens: the same numbers on the host; read back from the tensors when not given.
        plans: scratch of the implementation: what it derives from this layout once and uses in every layer.

    Raises:
        ShapeError: the tensors or lists do not fit each other.
        DtypeError: a tensor has another dtype than the one above.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int
    host_query_start_loc: list[int] = field(default_factory=list[int])
    host_seq_lens: list[int] = field(default_factory=list[int])
    plans: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False)

    def __post_init__(self) -> None:
        self._check_tensors()
        if not self.host_query_start_loc:
            self.host_query_start_loc = self.query_start_loc.tolist()
        if not self.host_seq_lens:
            self.host_seq_lens = self.seq_lens.tolist()
        self._check_numbers()

    @classmethod
    def build(
        cls, query_lens: Sequence[int], seq_lens: Sequence[int], block_tables: Tensor, slot_mapping: Tensor
    ) -> AttentionMetadata:
        """Builds the layout from host numbers; its tensors go where `block_tables` is.

        Args:
            query_lens: [B] tokens of each row in this step.
            seq_lens: [B] tokens of each row's context, this step's included.

        Raises:
            ShapeError, DtypeError: as the class.
        """
        starts = [0, *accumulate(query_lens)]
        device = block_tables.device
        return cls(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            max_query_len=max(query_lens, default=0),
            max_seq_len=max(seq_lens, default=0),
            host_query_start_loc=starts,
            host_seq_lens=list(seq_lens),
        )

    def advance(self) -> None:
        """Turns the layout of a step into that of the same rows, each with as many new tokens, one token later.

        Whoever owns the tensors has moved them on already: one more in every `seq_lens`, the next `slot_mapping`, and
        in `block_tables` the blocks that were added.
        """
        self.host_seq_lens = [seq_len + 1 for seq_len in self.host_seq_lens]
        self.max_seq_len += 1
        self.plans.clear()

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.host_seq_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.host_query_start_loc[-1]

    def _check_tensors(self) -> None:
        for name, tensor, rank, dtype in (
            ("query_start_loc", self.query_start_loc, 1, torch.int32),
            ("seq_lens", self.seq_lens, 1, torch.int32),
            ("block_tables", self.block_tables, 2, torch.int32),
            ("slot_mapping", self.slot_mapping, 1, torch.int64),
        ):
            if tensor.dim() != rank:
                raise ShapeError(f"{name} must have {rank} dimension(s), got shape {list(tensor.shape)}")
            if tensor.dtype != dtype:
                raise DtypeError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:  # kernels go by addresses
                raise ShapeError(f"{name} must be dense, its elements are {tensor.stride(-1)} apart")
        num_rows = self.seq_lens.shape[0]
        if self.query_start_loc.shape[0] != num_rows + 1:
            raise ShapeError(f"query_start_loc must have {num_rows + 1} entries, got {self.query_start_loc.shape[0]}")
        if self.block_tables.shape[0] != num_rows:
            raise ShapeError(f"block_tables must have {num_rows} rows, got {self.block_tables.shape[0]}")

    def _check_numbers(self) -> None:
        starts, seq_lens = self.host_query_start_loc, self.host_seq_lens
        if len(starts) != self.query_start_loc.shape[0] or len(seq_lens) != self.seq_lens.shape[0]:
            raise ShapeError("host_query_start_loc and host_seq_lens must be as long as their tensors")
        if starts[0] != 0 or starts[-1] != self.slot_mapping.shape[0]:
            raise ShapeError(
                f"query_start_loc must go from 0 to the {self.slot_mapping.shape[0]} tokens of slot_mapping, "
                f"goes from {starts[0]} to {starts[-1]}"
            )
        query_lens = [stop - start for start, stop in pairwise(starts)]
        if min(query_lens, default=0) < 0 or any(map(operator.gt, query_lens, seq_lens)):
            row = next(
                i for i, (query, seq) in enumerate(zip(query_lens, seq_lens, strict=True)) if not 0 <= query <= seq
            )
            raise ShapeError(f"row {row} has {query_lens[row]} queries in a context of {seq_lens[row]}")
        if max(query_lens, default=0) != self.max_query_len:
            raise ShapeError(f"max_query_len is {max(query_lens, default=0)}, not {self.max_query_len}")
        if max(seq_lens, default=0) != self.max_seq_len:
            raise ShapeError(f"max_seq_len is {max(seq_lens, default=0)}, not {self.max_seq_len}")
