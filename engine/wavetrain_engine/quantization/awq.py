# SPDX-License-Identifier: Apache-2.0
"""From the tensors of an AWQ layer to its weight; `awq_config` describes them."""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.quantization.awq_config import AwqFormat
from wavetrain_engine.quantization.bit_packing import pack_int4, unpack_columns
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight

# Output j of eight is in field _FIELDS[j] of its word.
_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)


def decode_awq(stored: AwqFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns], equal to what AutoAWQ makes of the tensors.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    scales = tensors.scales("scales").t().contiguous()
    zeros = (_codes(tensors["qzeros"], rows).float() - 8).t().contiguous()
    weight = QuantizedWeight(
        scheme=QuantizationScheme(
            values="int4", group_size=min(stored.group_size or columns, columns), has_offsets=True
        ),
        in_features=columns,
        values=pack_int4(_codes(tensors["qweight"], rows).t()),
        scales=scales,
        offsets=zeros * scales,
    )
    return tensors.check_weight(weight, scale="scales", zeros=zeros)


def _codes(packed: Tensor, rows: int) -> Tensor:
    """Returns the codes [K or G, N] uint8, outputs in their order."""
    fields = unpack_columns(packed, 4, rows).unflatten(1, (-1, len(_FIELDS)))
    return fields[..., torch.tensor(_FIELDS, device=packed.device)].flatten(1)
