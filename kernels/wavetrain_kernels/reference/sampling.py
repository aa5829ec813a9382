# SPDX-License-Identifier: Apache-2.0
"""Penalties, filters and log-probabilities over logits. No step sorts the vocabulary unless nothing less will do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# N = rows, V = vocabulary size, L = tokens of the longest row.

# Columns whose maximum is taken first when the k largest of a row are looked for.
_SPAN = 32
# Candidates of top_p at first; as many times more each time they do not reach it.
_FIRST_CANDIDATES = 64
_CANDIDATE_GROWTH = 8


def apply_penalties(
    logits: Tensor, token_ids: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Penalizes tokens [N, L] in logits [N, V]. Repeated ids carry equal counts, so they write equal values."""
    seen = logits.gather(1, token_ids)
    repetition = repetition[:, None]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= presence[:, None] * (output_counts > 0) + frequency[:, None] * output_counts
    logits.scatter_(1, token_ids, seen)


def filter_thresholds(
    lowest: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> None:
    """lowest [N] = what logits [N, V] / temperature must reach to be kept by min_p, then top_k, then top_p."""
    is_greedy = temperature == 0
    scaled = logits.float() / temperature.masked_fill(is_greedy, 1.0)[:, None]
    most = scaled.amax(-1)
    lowest.fill_(float("-inf"))
    if min_p is not None:
        torch.add(most, min_p.log(), out=lowest)
        scaled.masked_fill_(scaled < lowest[:, None], float("-inf"))
    if top_k is not None:
        rows = ((top_k > 0) & (top_k < logits.shape[1])).nonzero().squeeze(1)
        _for_rows(lowest, scaled, rows, _top_k_threshold, top_k)
    if top_p is not None:
        rows = (top_p < 1.0).nonzero().squeeze(1)
        _for_rows(lowest, scaled, rows, _top_p_threshold, top_p)
    lowest.masked_fill_(is_greedy | ~most.isfinite(), float("-inf"))


def sample_greedy(token_ids: Tensor, best: Tensor, logits: Tensor) -> None:
    """token_ids [N], best [N] = where the largest logit is, and it; NaN counts as largest."""
    torch.max(logits, dim=-1, out=(best, token_ids))


def top_logprobs(ids: Tensor, logprobs: Tensor, ranks: Tensor, logits: Tensor, token_ids: Tensor) -> None:
    """Column 0 of ids and logprobs [N, 1 + k] = the given token with its rank [N]; the others = the k likeliest."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    own = scores.gather(1, token_ids[:, None])
    ids[:, :1] = token_ids[:, None]
    logprobs[:, :1] = own
    torch.sum(scores > own, dim=-1, out=ranks)
    ranks += 1
    if ids.shape[1] > 1:
        logprobs[:, 1:], ids[:, 1:] = _largest(scores, ids.shape[1] - 1)


def _for_rows(
    lowest: Tensor, logits: Tensor, rows: Tensor, find: Callable[[Tensor, Tensor], Tensor], values: Tensor
) -> None:
    """Raises the given rows' `lowest` to what `find` says of them and their values; excludes what lies below."""
    if not rows.shape[0]:
        return
    chosen = logits.index_select(0, rows)
    found = torch.maximum(lowest.index_select(0, rows), find(chosen, values.index_select(0, rows)))
    lowest.index_copy_(0, rows, found)
    logits.index_copy_(0, rows, chosen.masked_fill_(chosen < found[:, None], float("-inf")))


def _top_k_threshold(logits: Tensor, top_k: Tensor) -> Tensor:
    largest, _ = _largest(logits, int(top_k.max()))
    return largest.gather(1, top_k[:, None] - 1).squeeze(1)


def _top_p_threshold(logits: Tensor, top_p: Tensor) -> Tensor:
    probs = torch.softmax(logits, dim=-1)
    least = torch.zeros_like(top_p)
    pending = torch.arange(logits.shape[0], device=logits.device)
    num_candidates = _FIRST_CANDIDATES
    while pending.shape[0]:
        num_candidates = min(num_candidates, logits.shape[1])
        largest, _ = _largest(probs.index_select(0, pending), num_candidates)
        # A token is kept while those before it have not reached top_p.
        is_kept = largest.cumsum(-1).roll(1, dims=-1) < top_p.index_select(0, pending)[:, None]
        is_kept[:, 0] = True
        is_done = ~is_kept[:, -1] if num_candidates < logits.shape[1] else torch.ones_like(is_kept[:, -1])
        least[pending[is_done]] = largest.masked_fill(~is_kept, float("inf")).amin(-1)[is_done]
        pending = pending[~is_done]
        num_candidates *= _CANDIDATE_GROWTH
    return logits.masked_fill(probs < least[:, None], float("inf")).amin(-1)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest values of each row of x [N, V] and their columns, largest first.

    The k largest lie in the k spans with the largest maxima: finding those first leaves little to search.
    """
    num_rows, num_columns = x.shape
    num_spans = num_columns // _SPAN
    if k * 2 >= num_spans:
        return torch.topk(x, k, dim=-1)
    maxima = x[:, : num_spans * _SPAN].unflatten(1, (num_spans, _SPAN)).amax(-1)
    spans = torch.topk(maxima, k, dim=-1, sorted=False).indices
    columns = (spans[:, :, None] * _SPAN + torch.arange(_SPAN, device=x.device)).flatten(1)
    rest = torch.arange(num_spans * _SPAN, num_columns, device=x.device).expand(num_rows, -1)
    columns = torch.cat((columns, rest), dim=1)
    values, chosen = torch.topk(x.gather(1, columns), k, dim=-1)
    return values, columns.gather(1, chosen)
