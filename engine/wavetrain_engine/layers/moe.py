# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: of several feed-forward blocks a token goes to a few, and gets their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.activation import GATED_ACTIVATIONS
from wavetrain_engine.layers.linear import Linear
from wavetrain_engine.layers.parameter import PackedModule, empty_parameter
from wavetrain_kernels import ops
from wavetrain_kernels.ops import QuantizedWeight
from wavetrain_kernels.quantized_weight import can_stack, stack

# T = tokens of the step, H = hidden size, E = experts.


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family's checkpoints call the projections of an expert."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Router(Linear):
    """x [T, H] → logits [T, E] in float32, as they are summed: rounded, they would often be equal."""

    def __init__(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, num_experts, bias=False, dtype=dtype)

    def forward(self, x: ops.Rows) -> Tensor:
        """Returns the logits."""
        return ops.linear(x, self.packed, dtype=torch.float32)


class ExpertStack:
    """One projection of all experts, packed expert by expert. The first says whether they are quantized, and how."""

    packed: ops.PackedExperts

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, *, is_gated: bool, dtype: torch.dtype
    ) -> None:
        self._sizes = (num_experts, out_features, in_features)
        self._is_gated = is_gated
        self._dtype = dtype
        self._is_empty = True

    def put(self, expert: int, weight: Tensor | QuantizedWeight) -> None:
        """Packs the weight of one expert.

        Raises:
            DtypeError: it is not quantized as the first one was.
        """
        if self._is_empty:
            self.packed = self._place(weight)
            self._is_empty = False
        ops.pack_expert(self.packed, expert, weight)

    def _place(self, weight: Tensor | QuantizedWeight) -> ops.PackedExperts:
        if isinstance(weight, QuantizedWeight):
            return ops.empty_quantized_experts(self._sizes[0], weight, dtype=self._dtype, is_gated=self._is_gated)
        return ops.empty_experts(*self._sizes, dtype=self._dtype, device=weight.device, is_gated=self._is_gated)


class ExpertProjection(PackedModule):
    """The place of one expert's weight while it is loaded; packed, it is in the stack.

    Attributes:
        parts: name of each matrix in a checkpoint, beside this module → its rows, in the order they are stacked.
    """

    def __init__(
        self, stack: ExpertStack, expert: int, parts: Mapping[str, int], in_features: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(sum(parts.values()), in_features, dtype=dtype)
        self.parts = dict(parts)
        self.stack = stack
        self._expert = expert

    def pack(self) -> Tensor:
        loaded = self.weight.data
        self.stack.put(self._expert, loaded)
        del self.weight
        return self.stack.packed.data

    def pack_parts(self, parts: Sequence[Tensor | QuantizedWeight]) -> int:
        """Takes the weight as it is quantized, in parts by rows, instead of `pack`.

        Parts of different schemes, and one that is not quantized, make the weight one that is not.

        Returns:
            Bytes that it takes.

        Raises:
            DtypeError: it is not quantized as the first expert's was.
        """
        dtype, quantized = self.weight.dtype, [part for part in parts if isinstance(part, QuantizedWeight)]
        del self.weight
        if len(quantized) == len(parts) and can_stack(quantized):
            whole = stack(quantized)
        else:
            whole = torch.cat([part if isinstance(part, Tensor) else ops.dequantize(part).to(dtype) for part in parts])
        self.stack.put(self._expert, whole)
        if isinstance(whole, QuantizedWeight) and self.stack.packed.scheme is not None:
            return whole.num_bytes
        packed = self.stack.packed
        return packed.out_features * packed.in_features * packed.dtype.itemsize


class Expert(nn.Module):
    """The projections of one expert."""

    def __init__(self, gate_up: ExpertProjection, down: ExpertProjection) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down


class MixtureOfExperts(nn.Module):
    """[T, H] → [T, H] through the `top_k` experts that the router finds likeliest for each token."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        is_renormalized: bool,
        hidden_act: str,
        dtype: torch.dtype,
        names: ExpertNames | None = None,
    ) -> None:
        super().__init__()
        self.names = names or ExpertNames()
        self.gate = Router(hidden_size, num_experts, dtype=dtype)
        self.gate_up = ExpertStack(num_experts, 2 * intermediate_size, hidden_size, is_gated=True, dtype=dtype)
        self.down = ExpertStack(num_experts, hidden_size, intermediate_size, is_gated=False, dtype=dtype)
        gate_up_parts = {self.names.gate: intermediate_size, self.names.up: intermediate_size}
        self.experts = nn.ModuleList(
            Expert(
                ExpertProjection(self.gate_up, expert, gate_up_parts, hidden_size, dtype=dtype),
                ExpertProjection(self.down, expert, {self.names.down: hidden_size}, intermediate_size, dtype=dtype),
            )
            for expert in range(num_experts)
        )
        self._top_k = top_k
        self._is_renormalized = is_renormalized
        self._activation: ops.GatedActivation = GATED_ACTIVATIONS[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighted sum of what each token's experts make of it."""
        weights, expert_ids = ops.route_experts(self.gate(x), self._top_k, renormalize=self._is_renormalized)
        return ops.fused_moe(x, self.gate_up.packed, self.down.packed, weights, expert_ids, self._activation)
