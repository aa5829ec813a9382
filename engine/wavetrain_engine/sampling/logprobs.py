# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of raw logits as they cross to the scheduler: chosen first, so nothing vocabulary-wide leaves.

Raw means before penalties, filters and temperature: what the model said, not what the request made of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_engine.request import TokenLogprobs
from wavetrain_kernels import ops

# M = rows that are asked about, k = most of the likeliest tokens that one of them wants.


@dataclass(frozen=True, slots=True, eq=False)
class LogprobTensors:
    """What `ops.top_logprobs` returned.

    Attributes:
        ids, logprobs: [M, 1 + k], the given token first, then the likeliest.
        ranks: [M], of the given token.
    """

    ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, most: int) -> LogprobTensors:
        """Returns those of the given tokens [M] and the `most` likeliest of each row of logits [M, V]; does not wait.

        A `most` beyond the vocabulary means all of it.
        """
        return cls(*ops.top_logprobs(logits, token_ids, min(most, logits.shape[1])))

    def entries(self, num_top: Iterable[int]) -> list[TokenLogprobs]:
        """Returns what `host_entries` makes of them."""
        return host_entries(self.ids, self.logprobs, self.ranks, num_top)


def host_entries(ids: Tensor, logprobs: Tensor, ranks: Tensor, num_top: Iterable[int]) -> list[TokenLogprobs]:
    """Returns one entry per row of what `ops.top_logprobs` returned: its token, then its num_top[i] likeliest.

    The tensors are read, so where they are not on the host yet, it waits.
    """
    most = ids.shape[1] - 1
    rows = zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), num_top, strict=True)
    return [
        TokenLogprobs(
            token_ids=row_ids[: k + 1], logprobs=row_logprobs[: k + 1], ranks=[rank, *range(1, min(k, most) + 1)]
        )
        for row_ids, row_logprobs, rank, k in rows
    ]


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Returns, for each row of logits [N, V], the given token [N] int64 first, then the row's num_top[i] likeliest.

    A num_top beyond the vocabulary means all of it.
    """
    return LogprobTensors.of(logits, token_ids, max(num_top)).entries(num_top) if num_top else []


def prompt_logprobs(logits: Tensor, next_token_ids: list[int] | Tensor, k: int) -> list[TokenLogprobs]:
    """Returns one entry per position of logits [n, V]: about the prompt token that follows it, then the top k.

    Callers bound the memory by passing positions in chunks: each takes a few copies of its logits in float32.
    """
    if not isinstance(next_token_ids, Tensor):
        next_token_ids = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)
    return top_logprobs(logits, next_token_ids, [k] * logits.shape[0])
