# SPDX-License-Identifier: Apache-2.0
"""From logits and a SamplingBatch to one token per row, in vLLM's order of operations.

Check for NaN and inf; log-probabilities of the raw logits; logit_bias; forbidden tokens (min_tokens, bad words);
penalties; temperature; min_p; top_k; top_p; the draw. A row's token depends on nothing outside the row.

It comes in two halves. `launch` queues everything on the device and waits for nothing; `finish` makes of what came
back, whenever that is, what callers want to know. Errors are found in the second half: until then a row that cannot be
sampled from has some token of the vocabulary, which the next step may be fed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling.batch import RandomRows, SamplingBatch
from wavetrain_engine.sampling.logprobs import LogprobTensors
from wavetrain_kernels import ops
from wavetrain_kernels.errors import ShapeError

# N = rows, V = vocabulary size.

_NOT_FINITE = (
    "the model produced NaN or infinite logits for this request; if others end so too, serve the model with "
    "--dtype bfloat16 or float32"
)
_ALL_FORBIDDEN = "no token is left to choose from; loosen logit_bias, bad_words or min_tokens of this request"


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per row.

    Attributes:
        token_ids: by row; -1 for a row in `errors`.
        logprobs: by row; None where not asked for, and for a row in `errors`.
        errors: rows that could not be sampled from, with a message for the caller.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, str]


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTokens:
    """What `launch` left on the device, or a copy of it on the host.

    Attributes:
        token_ids: [N] int64, tokens of the vocabulary also where they mean nothing.
        best: [N] floating point, not finite where a row has nothing to choose from.
        raw_best: [N], likewise, of the logits before they were edited; None where they were not.
        logprobs: of the rows with a number in `num_top`, in order; None where there are none.
        num_top: by row, how many of the likeliest tokens it wants to know, or None.
    """

    token_ids: Tensor
    best: Tensor
    raw_best: Tensor | None = None
    logprobs: LogprobTensors | None = None
    num_top: list[int | None] | None = None

    def map(self, copy: Callable[[Tensor], Tensor]) -> DrawnTokens:
        """Returns the same with every tensor replaced by what `copy` makes of it."""
        found = self.logprobs
        return DrawnTokens(
            token_ids=copy(self.token_ids),
            best=copy(self.best),
            raw_best=None if self.raw_best is None else copy(self.raw_best),
            logprobs=None
            if found is None
            else LogprobTensors(copy(found.ids), copy(found.logprobs), copy(found.ranks)),
            num_top=self.num_top,
        )


class Sampler:
    """Chooses tokens. Holds no state: what matters of a request's history is in the batch."""

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Returns a token for each row of logits [N, V] (any float dtype), which are left as they are.

        Raises:
            ShapeError, DtypeError: the logits do not fit the batch.
        """
        return self.finish(self.launch(logits, batch))

    def launch(self, logits: Tensor, batch: SamplingBatch) -> DrawnTokens:
        """Queues what `sample` does on the logits' device and stream, and waits for nothing.

        Raises:
            ShapeError, DtypeError: the logits do not fit the batch.
        """
        if logits.dim() != 2 or logits.shape[0] != batch.num_rows:
            raise ShapeError(f"logits must be [{batch.num_rows}, V], got {list(logits.shape)}")
        if not batch.has_edits:
            token_ids, best = _choose(logits, batch.random)
            raw_best = None
        else:
            _, raw_best = ops.sample_greedy(logits)
            token_ids, best = _choose(_edit(logits, batch), batch.random)
        if batch.logprobs is None:
            return DrawnTokens(token_ids, best, raw_best)
        rows = batch.logprobs.rows
        logprobs = LogprobTensors.of(logits.index_select(0, rows), token_ids.index_select(0, rows), batch.logprobs.most)
        return DrawnTokens(token_ids, best, raw_best, logprobs, batch.logprobs.num_top)

    def finish(self, drawn: DrawnTokens) -> SampledTokens:
        """Returns what was drawn, and which rows are errors; reads the tensors on the host, so they belong there."""
        token_ids = drawn.token_ids.tolist()
        if drawn.raw_best is None:
            errors = _errors(drawn.best, _NOT_FINITE)
        else:
            errors = {**_errors(drawn.best, _ALL_FORBIDDEN), **_errors(drawn.raw_best, _NOT_FINITE)}
        for row in errors:
            token_ids[row] = -1
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if drawn.logprobs is not None and drawn.num_top is not None:
            wanted = {row: k for row, k in enumerate(drawn.num_top) if k is not None}
            for row, entry in zip(wanted, drawn.logprobs.entries(wanted.values()), strict=True):
                logprobs[row] = None if row in errors else entry
        return SampledTokens(token_ids, logprobs, errors)


def _errors(best: Tensor, message: str) -> dict[int, str]:
    values = best.tolist()
    if math.isfinite(sum(values)):  # as doubles they add up to something finite exactly where all are
        return {}
    return {row: message for row, value in enumerate(values) if not math.isfinite(value)}


def _edit(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Returns a copy in float32 with what the batch wants changed."""
    edited = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for edits in batch.edits:
        edited.index_put_((edits.rows, edits.token_ids), edits.biases, accumulate=True)
    if batch.penalties is not None:
        rows = batch.penalties
        penalized = edited.index_select(0, rows.rows)
        ops.apply_penalties(
            penalized, rows.token_ids, rows.output_counts, rows.repetition, rows.presence, rows.frequency
        )
        edited.index_copy_(0, rows.rows, penalized)
    return edited


def _choose(logits: Tensor, random: RandomRows | None) -> tuple[Tensor, Tensor]:
    """Returns each row's token [N], and its largest logit [N]."""
    if random is None:
        return ops.sample_greedy(logits)
    lowest = None
    if random.has_filters:
        lowest = ops.filter_thresholds(
            logits, random.temperature, top_k=random.top_k, top_p=random.top_p, min_p=random.min_p
        )
    return ops.sample(logits, random.seeds, random.positions, random.temperature, lowest)
