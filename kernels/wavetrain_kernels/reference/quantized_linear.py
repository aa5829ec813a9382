# SPDX-License-Identifier: Apache-2.0
"""Linear layers over quantized weights, as their definition has it. A packed weight is the weight itself."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_kernels.quantized_weight import QuantizedWeight
from wavetrain_kernels.reference.activation import gated_activation

# T = rows, N = outputs, K = inputs.

_LARGEST = {"int8": 127.0, "fp8": 448.0}


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Returns the weight [N, K] in float32, its columns in the order of the inputs."""
    scheme = weight.scheme
    values = unpack_values(weight)
    scales = _spread(weight.scales, weight)
    dense = values * scales if weight.offsets is None else values * scales - _spread(weight.offsets, weight)
    if scheme.is_reordered:
        assert weight.column_order is not None, "a reordered weight has an order"
        dense = torch.empty_like(dense).index_copy_(1, weight.column_order, dense)
    return dense


def unpack_values(weight: QuantizedWeight) -> Tensor:
    """Returns what the values stand for [N, K] in float32, before scales, columns in the order they are held in."""
    if weight.scheme.values != "int4":
        return weight.values.float()
    halves = torch.stack((weight.values & 15, weight.values >> 4), dim=-1).flatten(1)[:, : weight.in_features]
    return halves.float() - 8 if weight.codebook is None else weight.codebook[halves.long()]


def _spread(grid: Tensor, weight: QuantizedWeight) -> Tensor:
    """A number of each group and block of rows → of each element."""
    rows = grid.repeat_interleave(weight.scheme.block_rows, 0)[: weight.out_features]
    return rows.repeat_interleave(weight.scheme.group_size, 1)[:, : weight.in_features]


def quantize_inputs(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Rounds the rows of x [T, K] as the weight's scheme wants it.

    Returns:
        int8 or float8_e4m3fn [T, K] in the order of the weight's values, and the scales
        [T, ceil(K / input_group_size)] in float32.
    """
    inputs = weight.scheme.inputs
    assert inputs is not None, "only schemes that round their inputs"
    if weight.scheme.is_reordered:
        assert weight.column_order is not None, "a reordered weight has an order"
        x = x[:, weight.column_order]
    group, largest = weight.scheme.input_group_size or x.shape[1], _LARGEST[inputs]
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    if weight.input_scale is None:
        scales = wide.abs().amax(-1) / largest
        scales = torch.where(scales == 0, 1.0, scales)
    else:
        scales = weight.input_scale.expand(wide.shape[:2])
    scaled = (wide / scales[..., None]).clamp(-largest, largest).flatten(1)[:, : x.shape[1]]
    return (scaled.round().to(torch.int8) if inputs == "int8" else scaled.to(torch.float8_e4m3fn)), scales


def round_inputs(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Returns x [T, K] in float32, rounded as the weight's scheme wants it."""
    if weight.scheme.inputs is None:
        return x.float()
    values, scales = quantize_inputs(x, weight)
    group = weight.scheme.input_group_size or x.shape[1]
    rounded = values.float() * scales.repeat_interleave(group, 1)[:, : x.shape[1]]
    if weight.column_order is None:
        return rounded
    return torch.empty_like(rounded).index_copy_(1, weight.column_order, rounded)


def pack_quantized(weight: QuantizedWeight, _dtype: torch.dtype, _is_gated: bool) -> QuantizedWeight:
    """Returns the weight."""
    return weight


def quantized_linear(out: Tensor, x: Tensor, packed: QuantizedWeight, bias: Tensor | None) -> None:
    """out [T, N] = rounded x @ weight.T + bias."""
    out.copy_(_product(x, packed, bias))


def quantized_gated_linear(
    out: Tensor, x: Tensor, packed: QuantizedWeight, bias: Tensor | None, activation: str
) -> None:
    """out [T, N / 2] = act(first half) * second half of rounded x @ weight.T + bias."""
    gate, up = _product(x, packed, bias).chunk(2, dim=-1)
    out.copy_(gated_activation(gate, up, activation))


def _product(x: Tensor, packed: QuantizedWeight, bias: Tensor | None) -> Tensor:
    product = round_inputs(x, packed) @ dequantize(packed).t()
    return product if bias is None else product + bias.float()
