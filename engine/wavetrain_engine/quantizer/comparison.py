# SPDX-License-Identifier: Apache-2.0
"""How far a quantized model's predictions are from the original's, on the same text.

The original's last hidden states are kept while its layers pass by; the quantized one is loaded from its checkpoint and
run by the engine, as it will be served.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model, resolve_dtype
from wavetrain_engine.quantizer.layer_runner import LayerRunner
from wavetrain_engine.weights.loader import load_weights

# W = windows, S = tokens of a window, H = hidden size, B = windows computed at once, V = vocabulary size.

_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out.

    Attributes:
        num_tokens: that were predicted.
        original_perplexity, perplexity: e to the mean negative log-likelihood of the text.
        kl_divergence: mean over the tokens, of the quantized model's distribution from the original's, in nats.
        top1_agreement: share of the tokens for which both find the same one likeliest.
    """

    num_tokens: int
    original_perplexity: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        """1: no worse than the original."""
        return self.perplexity / self.original_perplexity


class PredictionMeter:
    """Adds up what two models predict.

    Args:
        original: the ends of the original model: its last norm and its output head.
        original_hidden: [W, S, H], what its layers end with.
        token_ids: [W, S].
    """

    def __init__(self, original: Model, original_hidden: Tensor, token_ids: Tensor) -> None:
        self._original = original
        self._hidden = original_hidden
        self._token_ids = token_ids
        self._sums = [0.0, 0.0, 0.0, 0.0]  # negative log-likelihoods of both, divergence, agreements
        self._count = 0

    def add(self, model: Model, start: int, hidden: Tensor) -> None:
        """Takes the final hidden states [B, S, H] of `model` for windows from `start` on into account."""
        for offset, window in enumerate(hidden):
            ids, original = self._token_ids[start + offset], self._hidden[start + offset]
            for first in range(0, len(ids) - 1, self._step()):
                last = min(first + self._step(), len(ids) - 1)
                rows = slice(first, last)
                logits = self._original.compute_logits(_normed(self._original, original[rows]))
                self._add(logits, model.compute_logits(window[rows].contiguous()), ids[first + 1 : last + 1])

    def result(self) -> Comparison:
        """Returns the means."""
        original, quantized, divergence, agreements = (total / self._count for total in self._sums)
        return Comparison(
            num_tokens=self._count,
            original_perplexity=math.exp(original),
            perplexity=math.exp(quantized),
            kl_divergence=divergence,
            top1_agreement=agreements,
        )

    def _add(self, original: Tensor, quantized: Tensor, targets: Tensor) -> None:
        before, after = original.double().log_softmax(-1), quantized.double().log_softmax(-1)
        self._sums[0] -= before.gather(1, targets[:, None]).sum().item()
        self._sums[1] -= after.gather(1, targets[:, None]).sum().item()
        self._sums[2] += (before.exp() * (before - after)).sum().item()
        self._sums[3] += (before.argmax(-1) == after.argmax(-1)).sum().item()
        self._count += targets.shape[0]

    def _step(self) -> int:
        return max(1, _LOGITS_AT_ONCE // self._original.config.vocab_size)


def compare(
    original: Model, original_hidden: Tensor, token_ids: Tensor, model_dir: Path, progress: Callable[[int], None]
) -> Comparison:
    """Compares the checkpoint in `model_dir`, as the engine runs it, with the original.

    Args:
        progress: called with the windows that are done.

    Raises:
        CheckpointError: it cannot be loaded, for lack of memory perhaps.
    """
    config = ModelConfig.load(model_dir)
    model = create_model(config, resolve_dtype(config), "cpu", max_model_len=token_ids.shape[1])
    load_weights(model, model_dir, config)
    meter = PredictionMeter(original, original_hidden, token_ids)

    def take(start: int, hidden: Tensor) -> None:
        meter.add(model, start, hidden)
        progress(start + hidden.shape[0])

    progress(0)
    with torch.inference_mode():
        LayerRunner(token_ids.shape[1]).run(model, token_ids, take)
    return meter.result()


def _normed(model: Model, hidden: Tensor) -> Tensor:
    norm = model.norm
    assert isinstance(norm, torch.nn.Module), "every family ends with a norm"
    return norm(hidden.contiguous())
