# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a quantized layer to its weight, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wavetrain_engine.quantization.compressed_tensors import decode_compressed
from wavetrain_engine.quantization.compressed_tensors_config import CompressedFormat
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_engine.quantization.stored_format import StoredFormat
from wavetrain_kernels.ops import QuantizedWeight

# A new method is one entry here, and one in `quantization_config`.
_DECODERS: dict[type, Callable[[Any, LayerTensors, int, int], QuantizedWeight]] = {
    CompressedFormat: decode_compressed,
}


def decode(stored: StoredFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns] of a layer, on the device that its tensors are on.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    return _DECODERS[type(stored)](stored, tensors, rows, columns)
