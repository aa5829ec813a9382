# SPDX-License-Identifier: Apache-2.0
"""From float32 logits to tokens. Logits of other dtypes are widened first, or go to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.reference import sampling as reference
from wavetrain_kernels.reference.gumbel import GROUP_SIZE

# N = rows, V = vocabulary size, L = tokens of the longest row.


class SamplingKernels:
    """The sampling functions of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def sample_greedy(self, token_ids: Tensor, best: Tensor, logits: Tensor) -> None:
        """token_ids [N], best [N] = where the largest logit is, and it; NaN counts as largest."""
        if logits.dtype != torch.float32:
            reference.sample_greedy(token_ids, best, logits)
            return
        logits = _whole_rows(logits)
        num_rows, size = logits.shape
        self._library.sample_greedy(
            token_ids.data_ptr(), best.data_ptr(), logits.data_ptr(), logits.stride(0), num_rows, size
        )

    def sample(
        self,
        token_ids: Tensor,
        best: Tensor,
        logits: Tensor,
        seeds: Tensor,
        positions: Tensor,
        temperature: Tensor,
        lowest: Tensor | None,
    ) -> None:
        """token_ids [N] = of each row of logits [N, V] what (seed, position) draw, best [N] = its largest logit."""
        logits = _whole_rows(logits.float())
        num_rows, size = logits.shape
        seeds, positions, temperature = seeds.contiguous(), positions.contiguous(), temperature.contiguous()
        lowest = None if lowest is None else lowest.contiguous()
        self._library.sample(
            token_ids.data_ptr(),
            best.data_ptr(),
            logits.data_ptr(),
            seeds.data_ptr(),
            positions.data_ptr(),
            temperature.data_ptr(),
            None if lowest is None else lowest.data_ptr(),
            self._library.scratch(num_rows * 2 * -(-size // GROUP_SIZE) * 4),
            logits.stride(0),
            num_rows,
            size,
        )

    def apply_penalties(
        self,
        logits: Tensor,
        token_ids: Tensor,
        output_counts: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> None:
        """Penalizes tokens [N, L] in logits [N, V]."""
        token_ids, output_counts = token_ids.contiguous(), output_counts.contiguous()
        repetition, presence, frequency = repetition.contiguous(), presence.contiguous(), frequency.contiguous()
        self._library.apply_penalties(
            logits.data_ptr(),
            token_ids.data_ptr(),
            output_counts.data_ptr(),
            repetition.data_ptr(),
            presence.data_ptr(),
            frequency.data_ptr(),
            self._library.scratch(token_ids.numel() * 4),
            *logits.shape,
            token_ids.shape[1],
        )

    def filter_thresholds(
        self,
        lowest: Tensor,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
    ) -> None:
        """lowest [N] = what logits [N, V] / temperature must reach to be kept by min_p, then top_k, then top_p."""
        logits, temperature = _whole_rows(logits.float()), temperature.contiguous()
        filters = [None if values is None else values.contiguous() for values in (top_k, top_p, min_p)]
        addresses = [None if values is None else values.data_ptr() for values in filters]
        self._library.filter_thresholds(
            lowest.data_ptr(),
            logits.data_ptr(),
            temperature.data_ptr(),
            *addresses,
            logits.stride(0),
            *logits.shape,
        )

    def top_logprobs(self, ids: Tensor, logprobs: Tensor, ranks: Tensor, logits: Tensor, token_ids: Tensor) -> None:
        """Column 0 of ids and logprobs [N, 1 + k] = the given token with its rank [N]; the others = the k likeliest."""
        logits = _whole_rows(logits.float())
        token_ids = token_ids.contiguous()
        num_rows, size = logits.shape
        self._library.top_logprobs(
            ids.data_ptr(),
            logprobs.data_ptr(),
            ranks.data_ptr(),
            logits.data_ptr(),
            token_ids.data_ptr(),
            num_rows,
            size,
            ids.shape[1] - 1,
            logits.stride(0),
        )


def _whole_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
