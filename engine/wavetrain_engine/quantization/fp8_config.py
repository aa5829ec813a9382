# SPDX-License-Identifier: Apache-2.0
"""What an fp8 checkpoint says of itself, of the form of Hugging Face, DeepSeek and AutoFP8. Without torch.

weight [N, K] float8_e4m3
weight_scale_inv   of each block, or one; a weight is multiplied by it, whatever its name says
weight_scale       in its place, where one scale is for all: AutoFP8
input_scale, activation_scale   two names of the one scale of static inputs
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import ConfigError, UnsupportedModelError
from wavetrain_engine.quantization.module_targets import SkippedModules
from wavetrain_engine.quantization.stored_format import FLOAT_DTYPES, GROUP_STEP, LayerKind, TensorSpec

_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """The scheme of a layer.

    Attributes:
        block: rows and columns that share a scale; None: all.
        has_input_scale: it is stored, one for all inputs.
    """

    block: tuple[int, int] | None
    has_input_scale: bool

    def describe(self) -> str:
        """Returns it as `fp8, blocks of 128 x 128`."""
        scales = "per tensor" if self.block is None else f"blocks of {self.block[0]} x {self.block[1]}"
        return f"fp8, {scales}{', static inputs' if self.has_input_scale else ''}"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns what the weight is stored in."""
        dtypes, one = (*FLOAT_DTYPES, "F8_E8M0"), ((), (1,), (1, 1))
        specs = {"weight": TensorSpec.of(("F8_E4M3",), (rows, columns))}
        if self.block is not None:
            grid = (math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1]))
            specs["weight_scale_inv"] = TensorSpec.of(dtypes, grid)
        else:
            # One of the two has to be there, which is checked when they are read.
            specs["weight_scale"] = TensorSpec.of(dtypes, *one, (rows, 1), is_optional=True)
            specs["weight_scale_inv"] = TensorSpec.of(dtypes, *one, (rows, 1), is_optional=True)
        if self.has_input_scale:
            specs["input_scale"] = TensorSpec.of(FLOAT_DTYPES, (), (1,), is_optional=True)
            specs["activation_scale"] = TensorSpec.of(FLOAT_DTYPES, (), (1,), is_optional=True)
        return specs


class Fp8Config:
    """Formats by layer."""

    method = "fp8"

    def __init__(self, usual: Fp8Format, skipped: SkippedModules) -> None:
        self._usual = usual
        self._skipped = skipped

    def format_of(self, layer: str, kind: LayerKind) -> Fp8Format | None:
        """Returns the format of every projection that no list leaves out."""
        return None if kind != "Linear" or layer == _HEAD or self._skipped.matches(layer) else self._usual


def parse_fp8(config: ConfigReader, where: str) -> Fp8Config:
    """Reads `quantization_config` of a config.json.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: it asks for what is not served.
    """
    inputs = config.string("activation_scheme", "dynamic")
    if inputs not in ("dynamic", "static"):
        raise UnsupportedModelError(
            f"{where}: activation_scheme {inputs[:40]!r} is not supported: dynamic and static are"
        )
    for key, served in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if config.string(key, served) != served:
            raise UnsupportedModelError(f"{where}: {key} must be {served}")
    block = config.integers("weight_block_size")
    if block and (len(block) != 2 or min(block) < 1 or max(block) > 2**20):
        raise ConfigError(f"{where}: weight_block_size must be two positive integers")
    if block and block[1] % GROUP_STEP:
        raise UnsupportedModelError(f"{where}: weight_block_size must be a multiple of {GROUP_STEP} wide")
    skipped = [*config.strings("modules_to_not_convert"), *config.strings("ignored_layers")]
    usual = Fp8Format((block[0], block[1]) if block else None, has_input_scale=inputs == "static")
    return Fp8Config(usual, SkippedModules(skipped, f"{where}: modules_to_not_convert"))
