# SPDX-License-Identifier: Apache-2.0
"""From logits and a SamplingBatch to one token per row, in vLLM's order of operations.

Check for NaN and inf; log-probabilities of the raw logits; logit_bias; forbidden tokens (min_tokens, bad words);
penalties; temperature; min_p; top_k; top_p; the draw. A row's token depends on nothing outside the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling.batch import RandomRows, SamplingBatch
from wavetrain_engine.sampling.logprobs import top_logprobs
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


class Sampler:
    """Chooses tokens. Holds no state: what matters of a request's history is in the batch."""

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Returns a token for each row of logits [N, V] (any float dtype), which are left as they are.

        Raises:
            ShapeError, DtypeError: the logits do not fit the batch.
        """
        if logits.dim() != 2 or logits.shape[0] != batch.num_rows:
            raise ShapeError(f"logits must be [{batch.num_rows}, V], got {list(logits.shape)}")
        if not batch.num_rows:
            return SampledTokens([], [], {})
        tokens, best = ops.sample_greedy(logits)
        errors = _errors(best, _NOT_FINITE)
        edited = logits
        if batch.has_edits:
            edited = _edit(logits, batch)
            tokens, best = ops.sample_greedy(edited)
            errors = {**_errors(best, _ALL_FORBIDDEN), **errors}
        if batch.random is not None:
            tokens = _draw(edited, batch.random, tokens)
        token_ids = tokens.tolist()
        for row in errors:
            token_ids[row] = -1
        return SampledTokens(token_ids, _logprobs(logits, tokens, batch, errors), errors)


def _errors(best: Tensor, message: str) -> dict[int, str]:
    values = best.tolist()
    if math.isfinite(sum(values)):  # as doubles they add up to something finite exactly where all are
        return {}
    return {row: message for row, value in enumerate(values) if not math.isfinite(value)}


def _edit(logits: Tensor, batch: SamplingBatch) -> Tensor:
    edited = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if batch.bias is not None and batch.bias.biases is not None:
        edited.index_put_((batch.bias.rows, batch.bias.token_ids), batch.bias.biases, accumulate=True)
    if batch.forbidden is not None:
        lowest = torch.tensor(float("-inf"), device=edited.device)
        edited.index_put_((batch.forbidden.rows, batch.forbidden.token_ids), lowest)
    if batch.penalties is not None:
        rows = batch.penalties
        penalized = edited.index_select(0, rows.rows)
        ops.apply_penalties(
            penalized, rows.token_ids, rows.output_counts, rows.repetition, rows.presence, rows.frequency
        )
        edited.index_copy_(0, rows.rows, penalized)
    return edited


def _draw(logits: Tensor, random: RandomRows, greedy: Tensor) -> Tensor:
    """Returns [N]: drawn tokens in the random rows, the greedy ones elsewhere."""
    chosen = logits if random.rows is None else logits.index_select(0, random.rows)
    chosen = (chosen / random.temperature[:, None]).contiguous()  # float32 whatever the logits were, and a copy
    ops.apply_top_k_top_p_min_p(chosen, top_k=random.top_k, top_p=random.top_p, min_p=random.min_p)
    drawn = ops.sample(chosen, random.seeds, random.positions)
    return drawn if random.rows is None else greedy.index_copy(0, random.rows, drawn)


def _logprobs(
    logits: Tensor, tokens: Tensor, batch: SamplingBatch, errors: dict[int, str]
) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * batch.num_rows
    if batch.num_logprobs is None:
        return found
    wanted = {row: k for row, k in enumerate(batch.num_logprobs) if k is not None and row not in errors}
    rows = torch.tensor(list(wanted), dtype=torch.int64, device=logits.device)
    entries = top_logprobs(logits.index_select(0, rows), tokens.index_select(0, rows), list(wanted.values()))
    for row, entry in zip(wanted, entries, strict=True):
        found[row] = entry
    return found
