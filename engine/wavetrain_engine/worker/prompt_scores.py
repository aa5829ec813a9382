# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts: computed where the hidden states are, read by the host when it has the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from wavetrain_engine.models.model import Model
from wavetrain_engine.request import TokenLogprobs
from wavetrain_engine.sampling.logprobs import LogprobTensors
from wavetrain_engine.sampling.upload import upload
from wavetrain_engine.worker.live_requests import PromptSpan

# Logits are needed at every prompt position; this many rows of V floats at a time.
_CHUNK = 128


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What was computed for one span.

    Attributes:
        index: of the row in the plan.
        num_logprobs: how many likelier tokens to tell for each position.
        chunks: what was computed, position after position.
    """

    index: int
    num_logprobs: int
    chunks: list[LogprobTensors]

    def map(self, copy: Callable[[Tensor], Tensor]) -> PromptScores:
        """Returns the same with each tensor copied."""
        chunks = [LogprobTensors(copy(part.ids), copy(part.logprobs), copy(part.ranks)) for part in self.chunks]
        return PromptScores(self.index, self.num_logprobs, chunks)

    def entries(self) -> list[TokenLogprobs]:
        """Returns an entry for each position; the tensors are on the host, and what they hold is there."""
        return [entry for part in self.chunks for entry in part.entries([self.num_logprobs] * part.ids.shape[0])]


def score_prompts(model: Model, hidden: Tensor, spans: Iterable[PromptSpan]) -> list[PromptScores]:
    """Begins to score spans of the step's hidden states [T, H]."""
    scores: list[PromptScores] = []
    for span in spans:
        rows = hidden[span.first : span.first + len(span.targets)]
        targets = upload(span.targets, hidden.device)
        chunks: list[LogprobTensors] = []
        for start in range(0, len(span.targets), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            logits = model.compute_logits(rows[chunk])
            chunks.append(LogprobTensors.of(logits, targets[chunk], span.num_logprobs))
        scores.append(PromptScores(span.index, span.num_logprobs, chunks))
    return scores
