# SPDX-License-Identifier: Apache-2.0
"""What a bitsandbytes checkpoint says of itself. Without torch.

4 bits, blocks of (usually) 64 of the weight's numbers in their order:

    weight                      two codes a byte, the first in the high half; bytes may pass for another dtype
    weight.absmax               a scale for each block; or, quantized again, a byte
    weight.quant_map [16]       what the codes stand for
    weight.nested_absmax, weight.nested_quant_map [256]    of scales quantized again, in blocks of 256
    weight.quant_state.bitsandbytes__nf4    JSON: block sizes, shape, the mean that was subtracted from the scales

8 bits: weight [N, K] int8, SCB [N]: the largest of each row, weight_format: 0, by rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError, UnsupportedModelError
from wavetrain_engine.quantization.module_targets import SkippedModules
from wavetrain_engine.quantization.stored_format import LayerKind, TensorSpec

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
_HEAD = "lm_head"
_STORAGE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class FourBitFormat:
    """The scheme of a layer.

    Attributes:
        kind: of the codes.
        is_nested: scales are quantized again.
    """

    kind: Literal["nf4", "fp4"]
    is_nested: bool

    @property
    def state(self) -> str:
        """The name of the tensor that holds JSON."""
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def describe(self) -> str:
        """Returns it as `nf4`."""
        return f"{self.kind}, {'nested scales' if self.is_nested else 'plain scales'}"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns what the weight is stored in."""
        size = rows * columns
        if size % 8:
            raise CheckpointError(f"bitsandbytes weights of {rows} x {columns} values are not supported")
        words = tuple((dtype, (size // 2 // bytes_, 1)) for dtype, bytes_ in _STORAGE_BYTES.items())
        blocks = {math.ceil(size / block) for block in BLOCK_SIZES}
        specs = {
            "weight": TensorSpec(words),
            "weight.absmax": TensorSpec.of(("U8" if self.is_nested else "F32",), *((number,) for number in blocks)),
            "weight.quant_map": TensorSpec.of(("F32",), (16,)),
            self.state: TensorSpec.text(),
        }
        if self.is_nested:
            nested = {math.ceil(number / NESTED_BLOCK_SIZE) for number in blocks}
            specs["weight.nested_absmax"] = TensorSpec.of(("F32",), *((number,) for number in nested))
            specs["weight.nested_quant_map"] = TensorSpec.of(("F32",), (256,))
        return specs


@dataclass(frozen=True, slots=True)
class EightBitFormat:
    """LLM.int8() (Dettmers et al. 2022); inputs stay as they are, where it rounds all but outliers."""

    def describe(self) -> str:
        """Returns `w8a16, per channel`."""
        return "w8a16, per channel"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns what the weight is stored in."""
        return {
            "weight": TensorSpec.of(("I8",), (rows, columns)),
            "SCB": TensorSpec.of(("F32",), (rows,)),
            "weight_format": TensorSpec.of(("U8",), (), (1,), is_optional=True),
        }


class BitsAndBytesConfig:
    """Formats by layer."""

    method = "bitsandbytes"

    def __init__(self, usual: FourBitFormat | EightBitFormat, skipped: SkippedModules) -> None:
        self._usual = usual
        self._skipped = skipped

    def format_of(self, layer: str, kind: LayerKind) -> FourBitFormat | EightBitFormat | None:
        """Returns the format of every projection that no list leaves out."""
        return None if kind != "Linear" or layer == _HEAD or self._skipped.matches(layer) else self._usual


def parse_bitsandbytes(config: ConfigReader, where: str) -> BitsAndBytesConfig:
    """Reads `quantization_config` of a config.json.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: it asks for what is not served.
    """
    is_4bit = config.boolean("load_in_4bit", config.boolean("_load_in_4bit", False))
    is_8bit = config.boolean("load_in_8bit", config.boolean("_load_in_8bit", False))
    if is_4bit == is_8bit:
        raise UnsupportedModelError(f"{where}: one of load_in_4bit and load_in_8bit must be true")
    skipped = SkippedModules(config.strings("llm_int8_skip_modules"), f"{where}: llm_int8_skip_modules")
    if is_8bit:
        return BitsAndBytesConfig(EightBitFormat(), skipped)
    kind = config.string("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise UnsupportedModelError(f"{where}: bnb_4bit_quant_type {kind[:40]!r} is not supported: nf4 and fp4 are")
    is_nested = config.boolean("bnb_4bit_use_double_quant", False)
    return BitsAndBytesConfig(FourBitFormat("nf4" if kind == "nf4" else "fp4", is_nested), skipped)
