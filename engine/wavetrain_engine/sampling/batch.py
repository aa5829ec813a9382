# SPDX-License-Identifier: Apache-2.0
"""What the rows of one step asked of the sampler, as tensors on its device; None for whatever no row asked.

Row numbers in here are positions within the batch (the order of `SamplingState.batch`'s argument), never the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# N = rows of the batch, P = rows with penalties, L = tokens of the longest of them.


@dataclass(frozen=True, slots=True, eq=False)
class RandomRows:
    """How each row draws its token; a row that takes the likeliest has temperature 0 and no filter.

    Attributes:
        temperature: [N] float32.
        top_k: [N] int64, 0 = off.
        top_p, min_p: [N] float32, 1 and 0 = off.
        has_filters: some row excludes tokens before the draw; all three are given then, so that kernels need no
            variant for each selection of them.
        seeds: [N] int64.
        positions: [N] int64, index in its sequence of the token that is drawn.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    has_filters: bool
    seeds: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyRows:
    """The rows with penalties; the tensors are the arguments of `ops.apply_penalties`.

    Attributes:
        rows: [P] int64.
        token_ids, output_counts: [P, L].
        repetition, presence, frequency: [P] float32.
    """

    rows: Tensor
    token_ids: Tensor
    output_counts: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenEdits:
    """Single logits to change: entry i adds biases[i] to token token_ids[i] of row rows[i]; -inf forbids it.

    Attributes:
        rows, token_ids: int64, of one length; a pair may occur again.
        biases: float32.
    """

    rows: Tensor
    token_ids: Tensor
    biases: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LogprobRows:
    """The rows that want log-probabilities.

    Attributes:
        rows: [number of them] int64 on the device.
        num_top: by row of the batch, how many of the likeliest it wants beside its own token; None: nothing at all.
    """

    rows: Tensor
    num_top: list[int | None]

    @property
    def most(self) -> int:
        """The largest number that a row wants."""
        return max((k for k in self.num_top if k is not None), default=0)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """One step's sampling: `random` says how rows draw.

    Attributes:
        num_rows: N.
        random: None where every row takes its likeliest token.
        edits: added to the logits one after the other.
        penalties, logprobs: None where no row has any.
    """

    num_rows: int
    random: RandomRows | None = None
    edits: tuple[TokenEdits, ...] = ()
    penalties: PenaltyRows | None = None
    logprobs: LogprobRows | None = None

    @property
    def has_edits(self) -> bool:
        """True where some logit is changed before the choice."""
        return self.penalties is not None or bool(self.edits)
