# SPDX-License-Identifier: Apache-2.0
"""One projection of all experts of a layer, quantized: each packed as a weight of its own, all side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_kernels.gpu.launch import cdiv
from wavetrain_kernels.gpu.quantized_packing import PackedQuantized, QuantizedShape, can_pack, pack, value_unit
from wavetrain_kernels.quantized_weight import QuantizationScheme, QuantizedWeight

# E = experts, N = outputs, K = inputs, G = groups of inputs.


@dataclass(slots=True, eq=False, kw_only=True)
class QuantizedExperts:
    """The data of PackedExperts of quantized weights; what an attribute holds of one expert, PackedQuantized says.

    Attributes:
        scheme: the first expert's; others may have offsets or an order that it has not.
        shape: of each expert.
        unit: what the kernels make of a value of 1.
        words: [E, N, words of a row] int32.
        scales: [E, G, N] float32.
        zeros: likewise; None while no expert has offsets.
        codebook: [16] of `dtype`, of all experts.
        column_order: [E, K] int32; None while all experts' inputs are in order.
    """

    scheme: QuantizationScheme
    shape: QuantizedShape
    unit: float
    dtype: torch.dtype
    is_gated: bool
    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    column_order: Tensor | None = None

    def __len__(self) -> int:
        return self.words.shape[0]

    @property
    def num_bytes(self) -> int:
        """That its tensors take."""
        tensors = (self.words, self.scales, self.zeros, self.codebook, self.column_order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def empty_quantized_experts(
    num_experts: int, like: QuantizedWeight, dtype: torch.dtype, is_gated: bool
) -> QuantizedExperts | None:
    """Returns a place for so many experts; None where there is no kernel for weights like that one."""
    if not can_pack(like, dtype):
        return None
    shape = QuantizedShape.of(like.scheme, like.out_features, like.in_features)
    num_words = shape.num_blocks * shape.plane // 2
    num_groups = cdiv(shape.in_features, shape.group_size) if shape.group_size else 1
    size = shape.out_features
    return QuantizedExperts(
        scheme=like.scheme,
        shape=shape,
        unit=value_unit(like.scheme, dtype),
        dtype=dtype,
        is_gated=is_gated,
        words=torch.empty(num_experts, size, num_words, dtype=torch.int32, device=like.device),
        scales=torch.empty(num_experts, num_groups, size, device=like.device),
        codebook=None if like.codebook is None else like.codebook.to(dtype),
    )


def pack_quantized_expert(packed: QuantizedExperts, expert: int, weight: QuantizedWeight) -> None:
    """Puts the weight of one expert in its place. What only single experts have, all others get in its neutral form."""
    one = pack(weight, packed.dtype, packed.is_gated)
    packed.words[expert].copy_(one.words)
    packed.scales[expert].copy_(one.scales)
    middle = packed.shape.middle * packed.unit
    if one.zeros is not None and packed.zeros is None:
        packed.zeros = torch.full_like(packed.scales, middle)
    if packed.zeros is not None:
        packed.zeros[expert] = middle if one.zeros is None else one.zeros
    _put_order(packed, expert, one)


def _put_order(packed: QuantizedExperts, expert: int, one: PackedQuantized) -> None:
    plain = torch.arange(packed.shape.in_features, dtype=torch.int32, device=packed.words.device)
    if one.column_order is not None and packed.column_order is None:
        packed.column_order = plain.repeat(len(packed), 1)
    if packed.column_order is not None:
        packed.column_order[expert] = plain if one.column_order is None else one.column_order
