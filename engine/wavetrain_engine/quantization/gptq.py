# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a GPTQ layer to its weight; `gptq_config` describes them."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.quantization.bit_packing import (
    int4_values,
    int8_values,
    reorder,
    unpack_columns,
    widened_int2_values,
)
from wavetrain_engine.quantization.gptq_config import GptqFormat
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight

_UNPACK = {2: widened_int2_values, 4: int4_values, 8: int8_values}
# 1 in each field of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def decode_gptq(stored: GptqFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns], equal to what GPTQModel makes of the tensors.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    group_size = min(stored.group_size or columns, columns)
    order = None
    if tensors.get("g_idx") is not None:
        order = tensors.column_order("g_idx", group_size, columns)
    # A column of the stored words is a row of the weight, with its codes as they have to be.
    values = _UNPACK[stored.bits](tensors["qweight"].t(), columns)
    if order is not None:
        values = reorder(values, order, is_int4=values.dtype == torch.uint8)
    scales = tensors.scales("scales").t().contiguous()
    zeros = _zero_points(stored, tensors["qzeros"], rows)
    # Files that call themselves symmetric may have other zero points than the middle; they count.
    is_centred = stored.is_symmetric and not zeros.any()
    weight = QuantizedWeight(
        scheme=QuantizationScheme(
            values="int8" if stored.bits == 8 else "int4",
            group_size=group_size,
            has_offsets=not is_centred,
            is_reordered=order is not None,
        ),
        in_features=columns,
        values=values,
        scales=scales,
        offsets=None if is_centred else zeros * scales,
        column_order=order,
    )
    return tensors.check_weight(weight, scale="scales", zeros=zeros)


def _zero_points(stored: GptqFormat, packed: Tensor, rows: int) -> Tensor:
    """Returns them [N, G] in float32, relative to the middle of the codes."""
    if stored.has_reduced_zeros:
        # Whole words are added to, as the 1s were subtracted: a zero point of 0 borrowed from its neighbour.
        packed = packed + _ONES[stored.bits]
    codes = unpack_columns(packed, stored.bits, rows)
    return (codes.float() - 2 ** (stored.bits - 1)).t().contiguous()
