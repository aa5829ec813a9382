# SPDX-License-Identifier: Apache-2.0
"""What the rows of one step asked of the sampler, as tensors; None for whatever no row asked.

Row numbers in here are positions within the batch (the order of `SamplingState.batch`'s argument), never the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# N = rows of the batch, R = rows that are not greedy, P = rows with penalties, L = distinct tokens of such a row.


@dataclass(frozen=True, slots=True, eq=False)
class RandomRows:
    """The rows that draw a token.

    Attributes:
        rows: [R] int64; None where they are all N, in order.
        temperature: [R] float32.
        top_k: [R] int64, 0 = off; None where no row filters by it. Likewise top_p and min_p, [R] float32.
        seeds: [R] int64.
        positions: [R] int64, index in its sequence of the token that is drawn.
    """

    rows: Tensor | None
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
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
    """Single logits to change: entry i is about token token_ids[i] of row rows[i]. No pair occurs twice.

    Attributes:
        rows, token_ids: int64, of one length.
        biases: float32, what to add; None: the tokens are forbidden.
    """

    rows: Tensor
    token_ids: Tensor
    biases: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """One step's sampling: greedy rows take the likeliest token, the others are in `random`.

    Attributes:
        num_rows: N.
        random: None where all rows are greedy.
        penalties, bias, forbidden: None where no row has any.
        num_logprobs: per row how many top log-probabilities it wants beside its token's, or None for none at all;
            None where no row wants any.
    """

    num_rows: int
    random: RandomRows | None = None
    penalties: PenaltyRows | None = None
    bias: TokenEdits | None = None
    forbidden: TokenEdits | None = None
    num_logprobs: list[int | None] | None = None

    @property
    def has_edits(self) -> bool:
        """True where some logit is changed before the choice."""
        return self.penalties is not None or self.bias is not None or self.forbidden is not None
