# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts over weights packed once at load; bfloat16. Other dtypes go to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.cpu.memory import HugePool
from wavetrain_kernels.reference import moe as reference

# T = tokens, E = experts, k = experts of a token, H = hidden size, I = units of an expert.

_TILE, _DEPTH, _PANEL, _BLOCK = 16, 32, 32, 32
_LINE_BYTES = 64
_ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}


class MoeKernels:
    """Routing and experts of one compiled library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._memory = HugePool()

    def empty_experts(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        is_gated: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Returns memory [E, elements of an expert], laid out as a linear layer's weight: see source/linear.h."""
        if dtype != torch.bfloat16:
            return reference.empty_experts(num_experts, out_features, in_features, is_gated, dtype, device)
        panels = _ceil_div(out_features // 2, _TILE) if is_gated else _ceil_div(out_features, _PANEL)
        size = panels * _ceil_div(in_features, _DEPTH) * _PANEL * _DEPTH
        return self._memory.empty(num_experts * size, dtype).view(num_experts, size)

    def pack_expert(self, packed: Tensor, expert: int, weight: Tensor, is_gated: bool) -> None:
        """Packs the weight [N, K] of one expert into its place."""
        if weight.dtype != torch.bfloat16:
            reference.pack_expert(packed, expert, weight, is_gated)
            return
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        num_outputs, num_inputs = weight.shape
        self._library.pack_weight(
            packed[expert].data_ptr(), weight.data_ptr(), weight.stride(0), num_outputs, num_inputs, is_gated
        )

    def route_experts(self, weights: Tensor, expert_ids: Tensor, logits: Tensor, renormalize: bool) -> None:
        """weights [T, k], expert_ids [T, k] = the k likeliest of logits [T, E]."""
        logits = logits.contiguous()
        self._library.route_experts(
            weights.data_ptr(),
            expert_ids.data_ptr(),
            logits.data_ptr(),
            logits.shape[0],
            logits.shape[1],
            weights.shape[1],
            renormalize,
        )

    def fused_moe(
        self,
        out: Tensor,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        num_units: int,
        activation: str,
    ) -> None:
        """out [T, H] = for each token of x [T, H] the weighted sum of what its experts make of it."""
        if x.dtype != torch.bfloat16:
            reference.fused_moe(out, x, gate_up, down, weights, expert_ids, num_units, activation)
            return
        num_tokens, hidden = x.shape
        if not num_tokens:
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        weights, expert_ids = weights.contiguous(), expert_ids.contiguous()
        num_experts, top_k = gate_up.shape[0], expert_ids.shape[1]
        self._library.fused_moe(
            out.data_ptr(),
            x.data_ptr(),
            gate_up.data_ptr(),
            down.data_ptr(),
            weights.data_ptr(),
            expert_ids.data_ptr(),
            self._library.scratch(_scratch_bytes(num_tokens * top_k, num_experts, num_units)),
            x.stride(0),
            num_tokens,
            hidden,
            num_units,
            num_experts,
            top_k,
            _ACTIVATIONS[activation],
        )


def _scratch_bytes(num_pairs: int, num_experts: int, num_units: int) -> int:
    """What `Groups` of source/moe.h lays out: where pairs are, then blocks of rows, no expert sharing one."""
    index_bytes = (2 * (num_experts + 1) + 2 * num_pairs) * 4
    most_blocks = min(num_pairs, (num_pairs + (_BLOCK - 1) * min(num_experts, num_pairs)) // _BLOCK)
    block_bytes = _BLOCK * _ceil_div(num_units, _DEPTH) * _DEPTH * 2
    return _ceil_div(index_bytes, _LINE_BYTES) * _LINE_BYTES + most_blocks * block_bytes


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
