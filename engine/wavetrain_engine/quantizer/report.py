# SPDX-License-Identifier: Apache-2.0
"""What a quantized checkpoint is worth, in numbers that a program can read: report.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wavetrain_engine.quantizer.comparison import Comparison
from wavetrain_engine.quantizer.recipe import Recipe
from wavetrain_engine.version import VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is told of a run.

    Attributes:
        model_name: of the original.
        group_size: that was used.
        ignored: names of linear layers left as they are.
        comparison: None: none was asked for.
        original_bytes, num_bytes: of the weight files.
        seconds: of all runs that it took.
        layers: what was kept of each: errors of its matrices, scaled inputs, matrices that no token went through.
    """

    model_name: str
    recipe: Recipe
    group_size: int
    ignored: Sequence[str]
    comparison: Comparison | None
    original_bytes: int
    num_bytes: int
    seconds: float
    layers: Sequence[dict[str, Any]]

    def to_mapping(self) -> dict[str, Any]:
        """Returns it as it is written."""
        return {
            "version": VERSION,
            "model": self.model_name,
            "recipe": self.recipe.to_mapping() | {"group_size": self.group_size},
            "ignored": list(self.ignored),
            "held_out": self._held_out(),
            "size": {
                "original_bytes": self.original_bytes,
                "bytes": self.num_bytes,
                "ratio": self.num_bytes / self.original_bytes,
            },
            "seconds": round(self.seconds, 3),
            "layers": list(self.layers),
        }

    def lines(self) -> list[str]:
        """Returns it in a few words."""
        found = [f"size: {_mib(self.original_bytes)} → {_mib(self.num_bytes)}"]
        unseen = [name for layer in self.layers for name in layer["unseen"]]
        if self.comparison is not None:
            item = self.comparison
            change = 100 * (item.perplexity_ratio - 1)
            found += [
                f"perplexity on {item.num_tokens} held-out tokens: {item.original_perplexity:.4f} → "
                f"{item.perplexity:.4f} ({change:+.2f} %)",
                f"KL divergence {item.kl_divergence:.5f} nats, same likeliest token {item.top1_agreement:.2%}",
            ]
        if unseen and self.recipe.needs_text:
            found.append(
                f"{len(unseen)} matrices were rounded without text, as none of it was routed there; more "
                "--calibration-windows would help"
            )
        return found

    def _held_out(self) -> dict[str, Any] | None:
        item = self.comparison
        if item is None:
            return None
        return {
            "tokens": item.num_tokens,
            "original_perplexity": item.original_perplexity,
            "perplexity": item.perplexity,
            "perplexity_ratio": item.perplexity_ratio,
            "kl_divergence": item.kl_divergence,
            "top1_agreement": item.top1_agreement,
        }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"
