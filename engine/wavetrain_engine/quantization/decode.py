# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a quantized layer to its weight, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wavetrain_engine.quantization.awq import decode_awq
from wavetrain_engine.quantization.awq_config import AwqFormat
from wavetrain_engine.quantization.bitsandbytes import decode_4bit, decode_8bit
from wavetrain_engine.quantization.bitsandbytes_config import EightBitFormat, FourBitFormat
from wavetrain_engine.quantization.compressed_tensors import decode_compressed
from wavetrain_engine.quantization.compressed_tensors_config import CompressedFormat
from wavetrain_engine.quantization.fp8 import decode_fp8
from wavetrain_engine.quantization.fp8_config import Fp8Format
from wavetrain_engine.quantization.gptq import decode_gptq
from wavetrain_engine.quantization.gptq_config import GptqFormat
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_engine.quantization.stored_format import StoredFormat
from wavetrain_kernels.ops import QuantizedWeight

# A new method is one entry here, and one in `quantization_config`.
_DECODERS: dict[type, Callable[[Any, LayerTensors, int, int], QuantizedWeight]] = {
    AwqFormat: decode_awq,
    CompressedFormat: decode_compressed,
    EightBitFormat: decode_8bit,
    FourBitFormat: decode_4bit,
    Fp8Format: decode_fp8,
    GptqFormat: decode_gptq,
}


def decode(stored: StoredFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns] of a layer, on the device that its tensors are on.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    return _DECODERS[type(stored)](stored, tensors, rows, columns)
