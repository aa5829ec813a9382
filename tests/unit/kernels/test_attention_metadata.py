# SPDX-License-Identifier: Apache-2.0
"""A layout that is moved on by a token is the layout that would be built from the moved tensors."""

from __future__ import annotations

import torch

from wavetrain_kernels.ops import AttentionMetadata


def test_it_moves_on_with_its_tensors() -> None:
    tables, slots = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32), torch.tensor([17, 48])
    moved = AttentionMetadata.build([1, 1], [17, 1], tables, slots)
    moved.plans["mine"] = "of the step before"
    moved.seq_lens += 1
    moved.slot_mapping += 1
    moved.advance()
    built = AttentionMetadata.build([1, 1], [18, 2], tables, torch.tensor([18, 49]))
    for name in ("query_start_loc", "seq_lens", "block_tables", "slot_mapping"):
        assert torch.equal(getattr(moved, name), getattr(built, name)), name
    for name in ("host_query_start_loc", "host_seq_lens", "max_query_len", "max_seq_len", "plans"):
        assert getattr(moved, name) == getattr(built, name), name
