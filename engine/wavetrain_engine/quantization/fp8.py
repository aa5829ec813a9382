# SPDX-License-Identifier: Apache-2.0
"""From the tensors of an fp8 layer to its weight; `fp8_config` describes them."""

from __future__ import annotations

from wavetrain_engine.quantization.fp8_config import Fp8Format
from wavetrain_engine.quantization.layer_tensors import LayerTensors, block_grid
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight

_BLOCK = (128, 128)


def decode_fp8(stored: Fp8Format, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns].

    Inputs are rounded as kernels have it: for each row with one scale for the weight, for each 128 of a row with
    scales for blocks of 128 x 128, and not at all with other blocks.

    Raises:
        CheckpointError: a scale is missing, or the tensors contradict each other.
    """
    name = _one_of(tensors, "weight_scale_inv", "weight_scale")
    scales = tensors.scales(name, is_positive=True)
    if stored.block is None:
        group_size, block_rows, scales = columns, 1, scales.reshape(-1, 1).expand(rows, 1).contiguous()
    else:
        group_size, block_rows, scales = block_grid(scales, stored.block, rows, columns)
    is_usual_block = stored.block == _BLOCK
    has_input_scale = stored.has_input_scale and stored.block is None
    weight = QuantizedWeight(
        scheme=QuantizationScheme(
            values="fp8",
            group_size=group_size,
            block_rows=block_rows,
            inputs="fp8" if stored.block is None or is_usual_block else None,
            input_group_size=_BLOCK[1] if is_usual_block else None,
            has_input_scale=has_input_scale,
        ),
        in_features=columns,
        values=tensors["weight"],
        scales=scales,
        input_scale=tensors.input_scale(_one_of(tensors, "input_scale", "activation_scale"))
        if has_input_scale
        else None,
    )
    return tensors.check_weight(weight, scale=name)


def _one_of(tensors: LayerTensors, first: str, second: str) -> str:
    """Returns which of two names the layer has a tensor of."""
    found = [name for name in (first, second) if tensors.get(name) is not None]
    if len(found) != 1:
        raise tensors.wrong(first, f"and {second} are two names of one thing, of which one has to be there")
    return found[0]
