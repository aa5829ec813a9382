# SPDX-License-Identifier: Apache-2.0
"""Which tokens would complete a bad word, found out on the device from the rows' latest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wavetrain_engine.sampling.batch import TokenEdits
from wavetrain_engine.sampling.token_table import TokenTable
from wavetrain_engine.sampling.upload import upload, upload_ints

# W = bad words of all rows, H = tokens before the last one of the longest.


@dataclass(frozen=True, slots=True, eq=False)
class BadWords:
    """The bad words of two tokens or more of a batch's rows.

    Attributes:
        rows: [W] int64, each word's row in the batch.
        slots: [W] int64, that row's place in the token table.
        last: [W] int64, each word's last token, which is forbidden where the others have come.
        others: [W, H] int64, the tokens before it, the latest first; where a word is shorter, -1.
    """

    rows: Tensor
    slots: Tensor
    last: Tensor
    others: Tensor

    @classmethod
    def build(cls, rows: list[int], slots: Tensor, words: list[list[int]], device: torch.device) -> BadWords:
        """Returns the words, each of its row in the batch and its slot [W] int64, on the device."""
        others = np.full((len(words), max(len(word) for word in words) - 1), -1, dtype=np.int64)
        for index, word in enumerate(words):
            others[index, : len(word) - 1] = word[-2::-1]
        return cls(
            rows=upload_ints(rows, device),
            slots=slots,
            last=upload_ints([word[-1] for word in words], device),
            others=upload(others, device),
        )

    def forbidden(self, table: TokenTable, num_tokens: Tensor) -> TokenEdits:
        """Returns what forbids the words' last tokens; num_tokens [N] is how many each row of the batch has."""
        distance = torch.arange(1, self.others.shape[1] + 1, device=self.others.device)
        positions = num_tokens.index_select(0, self.rows)[:, None] - distance
        latest = table.at(self.slots[:, None], positions.clamp(min=0))
        has_come = ((latest == self.others) & (positions >= 0)) | (self.others < 0)
        biases = torch.zeros_like(self.last, dtype=torch.float32)
        return TokenEdits(self.rows, self.last, biases.masked_fill_(has_come.all(1), float("-inf")))
