# SPDX-License-Identifier: Apache-2.0
"""Projections. Matrices that read the same input are one matrix, so that a step reads its input once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from wavetrain_engine.layers.parameter import PackedModule, empty_parameter
from wavetrain_kernels import ops
from wavetrain_kernels.ops import PackedWeight, QuantizedWeight, Rows
from wavetrain_kernels.quantized_weight import can_stack, stack

# T = tokens of the step.


class Linear(PackedModule):
    """x [T, in] → [T, out]. The only caller of `ops.linear` for projections."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features, dtype=dtype)
        self.bias = empty_parameter(out_features, dtype=dtype) if bias else None
        self._separate: list[PackedWeight] = []

    @property
    def is_separate(self) -> bool:
        """Whether its parts are weights of their own, as they are of different schemes."""
        return bool(self._separate)

    @property
    def only_weight(self) -> PackedWeight | None:
        """The weight; None where its parts are weights of their own."""
        return None if self._separate else self.packed

    def pack_parts(self, parts: Sequence[Tensor | QuantizedWeight]) -> int:
        """Takes the weight as it is quantized, in parts by rows, instead of `pack`.

        Parts of one scheme become one weight.

        Returns:
            Bytes that it takes.
        """
        dtype, quantized = self.weight.dtype, [part for part in parts if isinstance(part, QuantizedWeight)]
        del self.weight
        if len(quantized) == len(parts) and can_stack(quantized):
            whole = stack(quantized) if len(quantized) > 1 else quantized[0]
            self.packed = ops.pack_quantized(whole, dtype=dtype, is_gated=self.is_gated)
            return _packed_bytes(self.packed, whole)
        if not quantized:
            self.packed = ops.pack_weight(
                torch.cat([part for part in parts if isinstance(part, Tensor)]), is_gated=self.is_gated
            )
            return _packed_bytes(self.packed, parts[0])
        self._separate = [_pack(part, dtype) for part in parts]
        return sum(_packed_bytes(packed, part) for packed, part in zip(self._separate, parts, strict=True))

    def project_parts(self, x: Rows) -> list[Tensor]:
        """Returns the products [T, out] with parts that are weights of their own, one by one."""
        sizes = [weight.out_features for weight in self._separate]
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        return [ops.linear(x, weight, bias) for weight, bias in zip(self._separate, biases, strict=True)]

    def forward(self, x: Rows) -> Tensor:
        """Returns x times the weight transposed, plus the bias."""
        return torch.cat(self.project_parts(x), -1) if self._separate else ops.linear(x, self.packed, self.bias)


class MergedLinear(Linear):
    """Several projections of one input, stacked by rows.

    Attributes:
        parts: name of each projection in a checkpoint (a sibling of this module's own name) → its rows, in
            the order they are stacked.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype)
        self.parts = dict(parts)

    def split(self, x: Rows) -> Sequence[Tensor]:
        """Returns the product with each projection, [T, its rows]."""
        return self.project_parts(x) if self.is_separate else self.forward(x).split(list(self.parts.values()), -1)


class GatedLinear(MergedLinear):
    """Gates and what they gate, as one projection: x [T, in] → act(gate(x)) * up(x) [T, out]."""

    is_gated = True

    def __init__(
        self, in_features: int, out_features: int, activation: ops.GatedActivation, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, {"gate_proj": out_features, "up_proj": out_features}, bias=bias, dtype=dtype)
        self._activation: ops.GatedActivation = activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Rows, inputs_for: PackedWeight | None = None
    ) -> Rows:
        """Returns the gated units, as the weight wants them that will read them."""
        if self.is_separate:
            gate, up = (part.float() for part in self.project_parts(x))
            gate = functional.silu(gate) if self._activation == "silu" else functional.gelu(gate, approximate="tanh")
            return (gate * up).to(x.dtype)
        return ops.gated_linear(x, self.packed, self._activation, self.bias, inputs_for=inputs_for)


class OutputHead(Linear):
    """Final hidden states [N, in] → logits [N, out] in float32, as they are summed."""

    def __init__(self, in_features: int, vocab_size: int, *, dtype: torch.dtype) -> None:
        super().__init__(in_features, vocab_size, bias=False, dtype=dtype)

    def forward(self, x: Rows) -> Tensor:
        """Returns the logits."""
        return ops.linear(x, self.packed, dtype=torch.float32)


def _pack(part: Tensor | QuantizedWeight, dtype: torch.dtype) -> PackedWeight:
    return ops.pack_quantized(part, dtype=dtype) if isinstance(part, QuantizedWeight) else ops.pack_weight(part)


def _packed_bytes(packed: PackedWeight, part: Tensor | QuantizedWeight) -> int:
    """Bytes of a packed weight, whose kernels may have kept it as it is, or made it a plain one."""
    if packed.scheme is None or not isinstance(part, QuantizedWeight):
        return packed.out_features * packed.in_features * packed.dtype.itemsize
    return part.num_bytes
