# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts over weights packed once at load, quantized or not, for bfloat16 inputs.

Other dtypes go to the reference.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.cpu.memory import HugePool
from wavetrain_kernels.cpu.quantized_linear import QuantizedLinearKernels
from wavetrain_kernels.cpu.quantized_moe import ExpertPanels, dense_stack, index_bytes, most_blocks, scratch_bytes
from wavetrain_kernels.quantized_weight import QuantizedWeight
from wavetrain_kernels.reference import moe as reference

# T = tokens, E = experts, k = experts of a token, H = hidden size, I = units of an expert.

_TILE, _DEPTH, _PANEL, _BLOCK = 16, 32, 32, 32
_ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}


class MoeKernels:
    """Routing and experts of one compiled library."""

    def __init__(self, library: Library, quantized: QuantizedLinearKernels) -> None:
        self._library = library
        self._quantized = quantized
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

    def empty_quantized_experts(
        self, num_experts: int, like: QuantizedWeight, dtype: torch.dtype, is_gated: bool
    ) -> ExpertPanels | reference.QuantizedExperts | None:
        """Returns a place for experts' weights in panels; None where there are no kernels for weights like that one."""
        if dtype != torch.bfloat16:
            return reference.empty_quantized_experts(num_experts, like, dtype, is_gated)
        return ExpertPanels.empty(num_experts, like, is_gated)

    def pack_quantized_expert(
        self, packed: ExpertPanels | reference.QuantizedExperts, expert: int, weight: QuantizedWeight
    ) -> None:
        """Packs the weight of one expert."""
        if isinstance(packed, ExpertPanels):
            packed.put(expert, self._quantized.pack_quantized(weight, torch.bfloat16, packed.is_gated))
        else:
            reference.pack_quantized_expert(packed, expert, weight)

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
        gate_up: Tensor | ExpertPanels | reference.QuantizedExperts,
        down: Tensor | ExpertPanels | reference.QuantizedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        num_units: int,
        activation: str,
    ) -> None:
        """out [T, H] = for each token of x [T, H] the weighted sum of what its experts make of it."""
        if x.dtype != torch.bfloat16:
            assert not isinstance(gate_up, ExpertPanels), "panels are of bfloat16"
            assert not isinstance(down, ExpertPanels), "panels are of bfloat16"
            reference.fused_moe(out, x, gate_up, down, weights, expert_ids, num_units, activation)
            return
        assert not isinstance(gate_up, reference.QuantizedExperts), "of bfloat16 there are panels"
        assert not isinstance(down, reference.QuantizedExperts), "of bfloat16 there are panels"
        num_tokens, hidden = x.shape
        if not num_tokens:
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        weights, expert_ids = weights.contiguous(), expert_ids.contiguous()
        num_experts, top_k = len(gate_up), expert_ids.shape[1]
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            run, stacks = self._library.fused_moe, (gate_up.data_ptr(), down.data_ptr())
            num_bytes = _scratch_bytes(num_tokens * top_k, num_experts, num_units)
        else:
            found = (
                dense_stack(gate_up, 2 * num_units, hidden, is_gated=True)
                if isinstance(gate_up, Tensor)
                else gate_up.stack(),
                dense_stack(down, hidden, num_units, is_gated=False) if isinstance(down, Tensor) else down.stack(),
            )
            run, stacks = self._library.quantized_moe, (ctypes.byref(found[0]), ctypes.byref(found[1]))
            num_bytes = scratch_bytes(self._library, num_tokens * top_k, num_experts, num_units, found)
        run(
            out.data_ptr(),
            x.data_ptr(),
            *stacks,
            weights.data_ptr(),
            expert_ids.data_ptr(),
            self._library.scratch(num_bytes),
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
    block_bytes = _BLOCK * _ceil_div(num_units, _DEPTH) * _DEPTH * 2
    return index_bytes(num_pairs, num_experts) + most_blocks(num_pairs, num_experts) * block_bytes


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
