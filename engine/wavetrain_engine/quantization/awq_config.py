# SPDX-License-Identifier: Apache-2.0
"""What an AWQ checkpoint says of itself, as AutoAWQ and GPTQModel write it (form `gemm`). Without torch.

qweight [K, N / 8] int32    codes of 4 bits of a row of K; the fields of a word hold outputs 0 2 4 6 1 3 5 7
qzeros  [G, N / 8] int32    zero points in the same order
scales  [G, N]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError, UnsupportedModelError
from wavetrain_engine.quantization.dynamic_overrides import DynamicOverrides
from wavetrain_engine.quantization.module_targets import SkippedModules
from wavetrain_engine.quantization.stored_format import FLOAT_DTYPES, GROUP_STEP, LayerKind, TensorSpec, num_groups

_PER_WORD = 8
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """The scheme of a layer; None as group size: all inputs."""

    group_size: int | None

    def describe(self) -> str:
        """Returns it as `w4a16, groups of 128, zero points`."""
        return f"w4a16, {'per channel' if self.group_size is None else f'groups of {self.group_size}'}, zero points"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns what the weight is stored in."""
        if rows % _PER_WORD:
            raise CheckpointError(f"AWQ cannot store {rows} outputs in words of {_PER_WORD}")
        if self.group_size is not None and self.group_size < columns and columns % self.group_size:
            raise CheckpointError(f"{columns} inputs are not a multiple of the group size {self.group_size}")
        groups = num_groups(columns, self.group_size)
        return {
            "qweight": TensorSpec.of(("I32",), (columns, rows // _PER_WORD)),
            "qzeros": TensorSpec.of(("I32",), (groups, rows // _PER_WORD)),
            "scales": TensorSpec.of(FLOAT_DTYPES, (groups, rows)),
        }


class AwqConfig:
    """Formats by layer."""

    method = "awq"

    def __init__(self, usual: AwqFormat, skipped: SkippedModules, overrides: DynamicOverrides, where: str) -> None:
        self._usual = usual
        self._skipped = skipped
        self._overrides = overrides
        self._where = where
        for values in overrides.all_values:
            _group_size(ConfigReader({"bits": 4, "group_size": usual.group_size or -1, **values}, where), where)

    def format_of(self, layer: str, kind: LayerKind) -> AwqFormat | None:
        """Returns the format of every projection that no list leaves out."""
        values = self._overrides.find(layer)
        if kind != "Linear" or layer == _HEAD or values is None or self._skipped.matches(layer):
            return None
        if not values:
            return self._usual
        reader = ConfigReader({"bits": 4, "group_size": self._usual.group_size or -1, **values}, self._where)
        return replace(self._usual, group_size=_group_size(reader, self._where))


def parse_awq(config: ConfigReader, where: str) -> AwqConfig:
    """Reads `quantization_config` of a config.json.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: it asks for what is not served.
    """
    form = config.string("version", config.string("checkpoint_format", config.string("format", "gemm"))).lower()
    if form != "gemm":
        raise UnsupportedModelError(f"{where}: version {form[:40]!r} is not supported, only 'gemm' is")
    skipped = SkippedModules(config.strings("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    return AwqConfig(AwqFormat(_group_size(config, where)), skipped, DynamicOverrides(config, where), where)


def _group_size(config: ConfigReader, where: str) -> int | None:
    bits = config.integer("bits", config.integer("w_bit", 4, high=32), high=32)
    if bits != 4:
        raise UnsupportedModelError(f"{where}: {bits} bits are not supported; AWQ has 4")
    group_size = config.integer(
        "group_size", config.integer("q_group_size", 128, low=-1, high=2**20), low=-1, high=2**20
    )
    if group_size != -1 and (group_size < GROUP_STEP or group_size % GROUP_STEP):
        raise UnsupportedModelError(
            f"{where}: group_size {group_size} is not supported, only multiples of {GROUP_STEP}"
        )
    return None if group_size == -1 else group_size
