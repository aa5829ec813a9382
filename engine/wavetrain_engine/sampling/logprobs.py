# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of raw logits as they cross to the scheduler: chosen first, so nothing vocabulary-wide leaves.

Raw means before penalties, filters and temperature: what the model said, not what the request made of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.request import TokenLogprobs
from wavetrain_kernels import ops


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Returns, for each row of logits [N, V], the given token [N] int64 first, then the row's num_top[i] likeliest.

    A num_top beyond the vocabulary means all of it.
    """
    if not num_top:
        return []
    most = min(max(num_top), logits.shape[1])
    ids, logprobs, ranks = ops.top_logprobs(logits, token_ids, most)
    rows = zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), num_top, strict=True)
    return [
        TokenLogprobs(
            token_ids=row_ids[: k + 1], logprobs=row_logprobs[: k + 1], ranks=[rank, *range(1, min(k, most) + 1)]
        )
        for row_ids, row_logprobs, rank, k in rows
    ]


def prompt_logprobs(logits: Tensor, next_token_ids: list[int] | Tensor, k: int) -> list[TokenLogprobs]:
    """Returns one entry per position of logits [n, V]: about the prompt token that follows it, then the top k.

    Callers bound the memory by passing positions in chunks: each takes a few copies of its logits in float32.
    """
    if not isinstance(next_token_ids, Tensor):
        next_token_ids = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)
    return top_logprobs(logits, next_token_ids, [k] * logits.shape[0])
