# SPDX-License-Identifier: Apache-2.0
"""What a GPTQ checkpoint says of itself, as AutoGPTQ and GPTQModel write it. Without torch.

qweight [K * bits / 32, N] int32    codes of a column of K, the first in the lowest bits
qzeros  [G, N * bits / 32] int32    zero points, minus 1 in the first version of the format
scales  [G, N]                      g_idx [K]: the group of each input, in any order with desc_act
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError, UnsupportedModelError
from wavetrain_engine.quantization.dynamic_overrides import DynamicOverrides
from wavetrain_engine.quantization.stored_format import FLOAT_DTYPES, GROUP_STEP, LayerKind, TensorSpec, num_groups

_BITS = (2, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """The scheme of a layer.

    Attributes:
        group_size: None: all inputs.
        is_symmetric: the zero point is the middle of the codes.
        is_ordered: config.json promises that groups are in the order of the inputs, so g_idx may be missing.
        has_reduced_zeros: zero points are stored minus 1.
    """

    bits: int
    group_size: int | None
    is_symmetric: bool
    is_ordered: bool
    has_reduced_zeros: bool

    def describe(self) -> str:
        """Returns it as `w4a16, groups of 128`."""
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        zeros = "" if self.is_symmetric else ", zero points"
        return f"w{self.bits}a16, {groups}{zeros}{'' if self.is_ordered else ', act-order'}"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns what the weight is stored in."""
        per_word = 32 // self.bits
        if rows % per_word or columns % per_word:
            raise CheckpointError(f"GPTQ cannot store a weight of {rows} x {columns} in words of {per_word} values")
        groups = num_groups(columns, self.group_size)
        return {
            "qweight": TensorSpec.of(("I32",), (columns // per_word, rows)),
            "qzeros": TensorSpec.of(("I32",), (groups, rows // per_word)),
            "scales": TensorSpec.of(FLOAT_DTYPES, (groups, rows)),
            "g_idx": TensorSpec.of(("I32", "I64"), (columns,), is_optional=self.is_ordered),
        }


class GptqConfig:
    """Formats by layer."""

    method = "gptq"

    def __init__(self, usual: GptqFormat, overrides: DynamicOverrides, where: str, *, has_head: bool) -> None:
        self._usual = usual
        self._overrides = overrides
        self._where = where
        self._has_head = has_head
        for values in overrides.all_values:
            _override(usual, values, where)

    def format_of(self, layer: str, kind: LayerKind) -> GptqFormat | None:
        """Returns the format of every projection, and of the output head where config.json says so."""
        values = self._overrides.find(layer)
        if kind != "Linear" or values is None or (layer == _HEAD and not self._has_head):
            return None
        return _override(self._usual, values, self._where)


def parse_gptq(config: ConfigReader, where: str) -> GptqConfig:
    """Reads `quantization_config` of a config.json.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: it asks for what is not served.
    """
    version = config.string("checkpoint_format", config.string("format", "gptq"))
    if version not in _VERSIONS or config.boolean("is_marlin_format", False):
        raise UnsupportedModelError(
            f"{where}: checkpoint_format {version[:40]!r} is not supported; supported are {', '.join(_VERSIONS)}"
        )
    if config.string("pack_dtype", "int32") != "int32":
        raise UnsupportedModelError(f"{where}: pack_dtype must be int32")
    if config.value("adapter") is not None:
        raise UnsupportedModelError(f"{where}: adapter is not supported")
    usual = _format(config, where, has_reduced_zeros=_VERSIONS[version] == 1)
    return GptqConfig(usual, DynamicOverrides(config, where), where, has_head=config.boolean("lm_head", False))


def _format(config: ConfigReader, where: str, *, has_reduced_zeros: bool) -> GptqFormat:
    bits = config.integer("bits", high=32)
    if bits not in _BITS:
        raise UnsupportedModelError(
            f"{where}: {bits} bits are not supported; supported are {', '.join(map(str, _BITS))}"
        )
    group_size = config.integer("group_size", low=-1, high=2**20)
    if group_size != -1 and (group_size < GROUP_STEP or group_size % GROUP_STEP):
        raise UnsupportedModelError(
            f"{where}: group_size {group_size} is not supported, only multiples of {GROUP_STEP}"
        )
    return GptqFormat(
        bits=bits,
        group_size=None if group_size == -1 else group_size,
        is_symmetric=config.boolean("sym", True),
        is_ordered=not config.boolean("desc_act", False),
        has_reduced_zeros=has_reduced_zeros,
    )


def _override(usual: GptqFormat, values: Mapping[str, Any], where: str) -> GptqFormat:
    """Returns the format with some values of its own; those that only matter while quantizing mean nothing here."""
    if not values:
        return usual
    for key in ("format", "checkpoint_format", "quant_method", "method", "pack_dtype", "adapter"):
        if values.get(key) is not None:
            raise UnsupportedModelError(f"{where}: dynamic with a {key} of its own is not supported")
    defaults: dict[str, Any] = {
        "bits": usual.bits,
        "group_size": -1 if usual.group_size is None else usual.group_size,
        "sym": usual.is_symmetric,
        "desc_act": not usual.is_ordered,
    }
    own = {key: value for key, value in values.items() if key in defaults}
    reader = ConfigReader({**defaults, **own}, f"{where}: dynamic")
    return _format(reader, where, has_reduced_zeros=usual.has_reduced_zeros)
