# SPDX-License-Identifier: Apache-2.0
"""What low-rank adapters of many requests look like to a projection: their matrices by slot, and who uses which.

An adapter adds x @ A.T @ B.T * scale to what a projection makes of x. Requests of one step may use different adapters,
or none: a token has the slot of its adapter, or -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_kernels.errors import DtypeError, ShapeError

# T = tokens in the step, S = slots, L = slices of a projection, R = room for ranks, H = in, N = out of all slices.

MAX_RANK = 256
MAX_SLICES = 3


@dataclass(frozen=True, eq=False)
class LoraAdapters:
    """The adapters of one projection. Loading one into a slot changes the tensors in place, between two steps.

    A projection that is several of the checkpoint's (queries, keys and values; gates and what they gate) has a slice
    for each, with an A of its own; their rows of B lie one after the other as their outputs do.

    Attributes:
        a: [S, L, R, H]; of slot s only the first `ranks[s]` of the R rows mean anything.
        b: [S, N, R]; likewise its columns.
        scales: [S] float32; alpha / rank, usually.
        ranks: [S] int32; 0: the slot is empty.
        slice_sizes: rows of B that belong to each slice; N in sum.

    Raises:
        ShapeError: the tensors do not fit each other, or there are more than MAX_SLICES slices or MAX_RANK ranks.
        DtypeError: a tensor has another dtype than the one above, or a and b differ.
    """

    a: Tensor
    b: Tensor
    scales: Tensor
    ranks: Tensor
    slice_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.a.dim() != 4 or self.b.dim() != 3:
            raise ShapeError(f"a must be [S, L, R, H] and b [S, N, R], got {list(self.a.shape)}, {list(self.b.shape)}")
        num_slots, num_slices, rank, _ = self.a.shape
        if self.b.shape != (num_slots, sum(self.slice_sizes), rank) or num_slices != len(self.slice_sizes):
            raise ShapeError(
                f"a {list(self.a.shape)}, b {list(self.b.shape)} and slices of {list(self.slice_sizes)} do not fit"
            )
        if not 1 <= num_slices <= MAX_SLICES or not 1 <= rank <= MAX_RANK or min(self.slice_sizes) < 1:
            raise ShapeError(
                f"at most {MAX_SLICES} slices, none of them empty, and ranks of 1 to {MAX_RANK} are possible, "
                f"got {list(self.slice_sizes)} and {rank}"
            )
        if not all(tensor.is_contiguous() for tensor in (self.a, self.b, self.scales, self.ranks)):
            raise ShapeError("a, b, scales and ranks must be contiguous")
        if not self.a.is_floating_point() or self.b.dtype != self.a.dtype:
            raise DtypeError(f"a and b must have one floating-point dtype, got {self.a.dtype} and {self.b.dtype}")
        for name, tensor, dtype in (("scales", self.scales, torch.float32), ("ranks", self.ranks, torch.int32)):
            if tensor.shape != (num_slots,):
                raise ShapeError(f"{name} must be [{num_slots}], got {list(tensor.shape)}")
            if tensor.dtype != dtype:
                raise DtypeError(f"{name} must be {dtype}, got {tensor.dtype}")

    @property
    def num_slots(self) -> int:
        """S."""
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        """H."""
        return self.a.shape[3]

    @property
    def out_features(self) -> int:
        """N."""
        return self.b.shape[1]


@dataclass(frozen=True, eq=False)
class LoraBatch:
    """Which adapter each token of a step uses, sorted once a step and read by every projection of every layer.

    Attributes:
        token_slots: [T] int32; -1, or a slot that there is not: no adapter.
        sorted_tokens: [T] int32; the tokens by slot, in their order within a slot; from slot_starts[S] on, anything.
        slot_starts: [S + 1] int32; slot s's tokens are sorted_tokens[slot_starts[s] : slot_starts[s + 1]].
    """

    token_slots: Tensor
    sorted_tokens: Tensor
    slot_starts: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_slots.shape[0]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.slot_starts.shape[0] - 1
