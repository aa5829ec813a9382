# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts. Packed experts are their weights, stacked: [E, out, in]; or quantized ones, as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from wavetrain_kernels.quantized_weight import QuantizedWeight
from wavetrain_kernels.reference.linear import gated_linear
from wavetrain_kernels.reference.quantized_linear import quantized_gated_linear, quantized_linear

# T = tokens, E = experts, k = experts of a token, H = hidden size, I = units of an expert.


def empty_experts(
    num_experts: int,
    out_features: int,
    in_features: int,
    _is_gated: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Returns uninitialised memory for the weights of all experts."""
    return torch.empty(num_experts, out_features, in_features, dtype=dtype, device=device)


def pack_expert(packed: Tensor, expert: int, weight: Tensor, _is_gated: bool) -> None:
    """Copies the weight [out, in] of one expert to its place."""
    packed[expert].copy_(weight)


class QuantizedExperts:
    """A quantized weight for each expert, once it is packed."""

    def __init__(self, num_experts: int) -> None:
        self._weights: list[QuantizedWeight | None] = [None] * num_experts

    @property
    def weights(self) -> list[QuantizedWeight]:
        """Those that are packed."""
        return [weight for weight in self._weights if weight is not None]

    def __getitem__(self, expert: int) -> QuantizedWeight:
        weight = self._weights[expert]
        assert weight is not None, "all experts are packed before they are used"
        return weight

    def __setitem__(self, expert: int, weight: QuantizedWeight) -> None:
        self._weights[expert] = weight

    def __len__(self) -> int:
        return len(self._weights)


def empty_quantized_experts(
    num_experts: int, _like: QuantizedWeight, _dtype: torch.dtype, _is_gated: bool
) -> QuantizedExperts:
    """Returns a place for the weights of all experts."""
    return QuantizedExperts(num_experts)


def pack_quantized_expert(packed: QuantizedExperts, expert: int, weight: QuantizedWeight) -> None:
    """Keeps the weight of one expert."""
    packed[expert] = weight


def route_experts(weights: Tensor, expert_ids: Tensor, logits: Tensor, renormalize: bool) -> None:
    """weights [T, k], expert_ids [T, k] = the k largest of softmax(logits [T, E]), in falling order."""
    probabilities = logits.softmax(-1)
    # Sorted by logit, as two may round to one probability; a row without a distribution gets the first experts.
    keys = logits.masked_fill(probabilities.isnan(), 0)
    order = keys.sort(dim=-1, descending=True, stable=True).indices[:, : weights.shape[1]]
    chosen = probabilities.gather(1, order)
    weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
    expert_ids.copy_(order)


def fused_moe(
    out: Tensor,
    x: Tensor,
    gate_up: Tensor | QuantizedExperts,
    down: Tensor | QuantizedExperts,
    weights: Tensor,
    expert_ids: Tensor,
    num_units: int,
    activation: str,
) -> None:
    """out [T, H] = sum over ranks of weights [T, k] * expert(x [T, H]); each term rounded, added in float32 by rank."""
    terms = torch.zeros(*expert_ids.shape, x.shape[1], dtype=x.dtype, device=x.device)
    for expert in range(len(gate_up)):
        tokens, ranks = (expert_ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        units = x.new_empty(len(tokens), num_units)
        _gate_up(units, x[tokens], gate_up[expert], activation)
        terms[tokens, ranks] = (_down(units, down[expert]) * weights[tokens, ranks, None]).to(x.dtype)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for term in terms.unbind(1):
        total += term
    out.copy_(total)


def _gate_up(units: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, activation: str) -> None:
    if isinstance(weight, QuantizedWeight):
        quantized_gated_linear(units, x, weight, None, activation)
    else:
        gated_linear(units, x, weight, None, activation)


def _down(units: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    if not isinstance(weight, QuantizedWeight):
        return F.linear(units, weight)
    products = units.new_empty(units.shape[0], weight.out_features)
    quantized_linear(products, units, weight, None)
    return products
