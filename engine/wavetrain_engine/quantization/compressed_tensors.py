# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a compressed-tensors layer to its weight; `compressed_tensors_config` describes them."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.quantization.bit_packing import (
    int4_values,
    int8_values,
    pack_int4,
    reorder,
    unpack_columns,
    widened_int2_values,
)
from wavetrain_engine.quantization.compressed_tensors_config import CompressedFormat
from wavetrain_engine.quantization.layer_tensors import LayerTensors, block_grid
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight

# N = outputs of the layer, K = inputs, G = groups of inputs.


def decode_compressed(stored: CompressedFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns], bit for bit what the compressed-tensors package makes of the tensors.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    group_size, block_rows, scales = _grid(stored, tensors, rows, columns)
    values = _values(stored, tensors, rows, columns)
    zeros = _zero_points(stored, tensors, rows, scales)
    order = tensors.column_order("weight_g_idx", group_size, columns) if stored.has_group_order else None
    if order is not None:
        values = reorder(values, order, is_int4=values.dtype == torch.uint8)
    has_input_scale = stored.inputs is not None and stored.has_input_scale
    tensors.check_zeros("input_zero_point")
    if stored.is_float:
        tensors.check_zeros("weight_zero_point")
    scheme = QuantizationScheme(
        values="fp8" if stored.is_float else "int8" if stored.num_bits == 8 else "int4",
        group_size=group_size,
        block_rows=block_rows,
        has_offsets=zeros is not None,
        is_reordered=order is not None,
        inputs=stored.inputs,
        input_group_size=128 if stored.block is not None and stored.inputs is not None else None,
        has_input_scale=has_input_scale,
    )
    weight = QuantizedWeight(
        scheme=scheme,
        in_features=columns,
        values=values,
        scales=scales,
        offsets=None if zeros is None else zeros * scales,
        column_order=order,
        input_scale=tensors.input_scale() if has_input_scale else None,
    )
    return tensors.check_weight(weight, scale="weight_scale", zeros=zeros)


def _grid(stored: CompressedFormat, tensors: LayerTensors, rows: int, columns: int) -> tuple[int, int, Tensor]:
    """Returns the group size, the rows of a block, and the scales as `QuantizedWeight` has them."""
    scales = tensors.scales("weight_scale", is_positive=stored.is_float)
    if stored.strategy == "tensor":
        return columns, 1, scales.view(1, 1).expand(rows, 1).contiguous()
    if stored.block is None:
        return min(stored.group_size or columns, columns), 1, scales.view(rows, -1)
    return block_grid(scales, stored.block, rows, columns)


def _values(stored: CompressedFormat, tensors: LayerTensors, rows: int, columns: int) -> Tensor:
    if stored.is_packed:
        if tensors["weight_shape"].tolist() != [rows, columns]:
            raise tensors.wrong("weight_shape", f"is {tensors['weight_shape'].tolist()}, not {[rows, columns]}")
        unpack = {2: widened_int2_values, 4: int4_values, 8: int8_values}[stored.num_bits]
        return unpack(tensors["weight_packed"], columns)
    values = tensors["weight"]
    if stored.is_float or stored.num_bits == 8:
        return values
    if (values < -8).any() or (values > 7).any():
        raise tensors.wrong("weight", "holds values that 4 bits cannot hold")
    return pack_int4((values + 8).to(torch.uint8))


def _zero_points(stored: CompressedFormat, tensors: LayerTensors, rows: int, scales: Tensor) -> Tensor | None:
    """Returns them in float32, in the shape of the scales."""
    name = "weight_zero_point"
    zeros = tensors.get(name)
    if zeros is None or stored.is_float:
        return None
    bits = stored.num_bits
    if zeros.dtype == torch.int32:  # side by side as the weights are, but by columns
        codes = unpack_columns(zeros.t(), bits, rows).t()
        plain = codes.float() - 2 ** (bits - 1)
    else:
        plain = zeros.float()
        if (plain < -(2 ** (bits - 1))).any() or (plain >= 2 ** (bits - 1)).any():
            raise tensors.wrong(name, f"holds zero points that {bits} bits cannot hold")
    if stored.is_symmetric:
        if plain.ne(0).any():
            raise tensors.wrong(name, "holds zero points, but config.json says that there are none")
        return None
    return plain.reshape(1 if stored.strategy == "tensor" else rows, -1).expand_as(scales)
