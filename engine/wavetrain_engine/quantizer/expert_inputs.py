# SPDX-License-Identifier: Apache-2.0
"""What goes into a mixture of experts, kept as it is: which expert reads what only the router knows."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.layers.activation import GATED_ACTIVATIONS
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.quantizer.input_moments import InputMoments
from wavetrain_engine.quantizer.layer_structure import MixtureInputs
from wavetrain_kernels import ops

# T = tokens, H = hidden size, E = experts of a mixture, U = units of an expert.

_TOKENS_AT_ONCE = 8192


class MixtureWatch:
    """Keeps the inputs [T, H] of a mixture, and tells what each expert reads.

    Attributes:
        mixture: that is watched.
    """

    def __init__(self, mixture: MixtureInputs, config: ModelConfig) -> None:
        assert config.moe is not None, "a family with mixtures of experts"
        self.mixture = mixture
        self._top_k = config.moe.num_experts_per_tok
        self._activation: ops.GatedActivation = GATED_ACTIVATIONS[config.hidden_act]
        self._pieces: list[Tensor] = []
        self._experts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Keeps a batch of inputs."""
        self._pieces.append(x.clone())  # whose memory kernels may use again

    def route(self, router: Tensor) -> None:
        """Finds each token's experts, with the router's weight [E, H]; once, when all inputs are there."""
        # As with the kernels, the likeliest experts are those of the largest logits.
        self._experts = [(x.float() @ router.t()).topk(self._top_k, dim=-1).indices for x in self._pieces]

    def moments(self) -> InputMoments:
        """Returns those of the inputs of all experts together."""
        moments = InputMoments(self.mixture.shared.in_features)
        for x in self._pieces:
            moments.add(x)
        return moments

    def expert_moments(self, expert: int, factors: Tensor | None) -> InputMoments:
        """Returns those of what an expert reads, after its input was divided by factors [H]."""
        moments = InputMoments(self.mixture.shared.in_features)
        for x in self._inputs(expert):
            moments.add(x)
        if factors is not None:
            moments.rescale(1 / factors)
        return moments

    def down_moments(self, expert: int, tensors: dict[str, Tensor], factors: Tensor | None) -> InputMoments:
        """Returns those of an expert's units [T, U], with the matrices it has in `tensors`."""
        names = self.mixture.experts[expert]
        gate, up = tensors[f"{names.gate}.weight"], tensors[f"{names.up}.weight"]
        packed = ops.pack_weight(torch.cat([gate, up]), is_gated=True)
        moments = InputMoments(gate.shape[0])
        for x in self._inputs(expert):
            for piece in x.split(_TOKENS_AT_ONCE):
                scaled = piece.float() if factors is None else piece.float() / factors
                moments.add(ops.gated_linear(scaled, packed, self._activation))
        return moments

    def _inputs(self, expert: int) -> list[Tensor]:
        return [
            x[(chosen == expert).any(-1)] for x, chosen in zip(self._pieces, self._experts, strict=True) if x.shape[0]
        ]
