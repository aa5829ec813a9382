# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts. Packed experts are their weights, stacked: [E, out, in]."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from wavetrain_kernels.reference.linear import gated_linear

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
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    num_units: int,
    activation: str,
) -> None:
    """out [T, H] = sum over ranks of weights [T, k] * expert(x [T, H]); each term rounded, added in float32 by rank."""
    terms = torch.zeros(*expert_ids.shape, x.shape[1], dtype=x.dtype, device=x.device)
    for expert in range(gate_up.shape[0]):
        tokens, ranks = (expert_ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        units = x.new_empty(len(tokens), num_units)
        gated_linear(units, x[tokens], gate_up[expert], None, activation)
        products = F.linear(units, down[expert]) * weights[tokens, ranks, None]
        terms[tokens, ranks] = products.to(x.dtype)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for term in terms.unbind(1):
        total += term
    out.copy_(total)
