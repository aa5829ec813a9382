# SPDX-License-Identifier: Apache-2.0
"""What a compressed-tensors checkpoint says of itself: groups of layers, each with a scheme. Without torch.

The format is that of the compressed-tensors package (github.com/vllm-project/compressed-tensors), which
llm-compressor writes.

    pack-quantized     weight_packed: codes plus 2 ** (bits - 1), side by side in int32, the first lowest
    int-quantized      weight: int8                          float-quantized    weight: float8_e4m3
    all                weight_scale, weight_zero_point (unless symmetric), weight_g_idx (act-order by group),
                       input_scale (static inputs)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from wavetrain_engine.quantization.module_targets import LayerTargets
from wavetrain_engine.quantization.stored_format import FLOAT_DTYPES, GROUP_STEP, LayerKind, TensorSpec, num_groups

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "naive-quantized", "float-quantized")
_SUPPORTED = (
    "pack-quantized with 2, 4 or 8 bits, int-quantized with 4 or 8, float-quantized with 8 (e4m3); by tensor, row, "
    "group or block"
)
_MAX_GROUPS = 256

Rounding = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedFormat:
    """The scheme of a layer.

    Attributes:
        num_bits: of a weight.
        is_float: e4m3; else integers.
        is_packed: stored in int32s.
        strategy: what shares a scale: the `tensor`, each `channel` (row), `group` of inputs or `block`.
        group_size: of `group`.
        block: rows and columns of `block`.
        is_symmetric: without zero points.
        has_group_order: which group an input is in is stored too.
        inputs: what inputs are rounded to; None: nothing.
        has_input_scale: it is stored, one for all inputs.
    """

    num_bits: int
    is_float: bool
    is_packed: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    is_symmetric: bool
    has_group_order: bool
    inputs: Rounding | None
    has_input_scale: bool

    def describe(self) -> str:
        """Returns it as `w4a16, groups of 128`."""
        weights = "fp8" if self.is_float else f"w{self.num_bits}"
        scheme = f"{weights}{'' if self.is_float and self.inputs else 'a16' if self.inputs is None else 'a8'}"
        of = {"group": f"groups of {self.group_size}", "block": f"blocks of {self.block}", "channel": "per channel"}
        extras = ["" if self.is_symmetric else ", zero points", ", act-order" if self.has_group_order else ""]
        static = ", static inputs" if self.has_input_scale and self.inputs else ""
        return f"{scheme}, {of.get(self.strategy, 'per tensor')}{''.join(extras)}{static}"

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes that the scales may have."""
        if self.strategy == "tensor":
            return ((1,), (), (1, 1))
        if self.strategy == "channel":
            return ((rows, 1), (rows,))
        if self.block is not None:
            return ((math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1])),)
        return ((rows, num_groups(columns, self.group_size)),)

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns what the weight is stored in."""
        if self.group_size is not None and self.group_size < columns and columns % self.group_size:
            raise CheckpointError(f"{columns} inputs are not a multiple of the group size {self.group_size}")
        scales = self.scale_shapes(rows, columns)
        specs = {"weight_scale": TensorSpec.of(FLOAT_DTYPES, *scales)}
        if self.is_packed:
            specs["weight_packed"] = TensorSpec.of(("I32",), (rows, math.ceil(columns * self.num_bits / 32)))
            specs["weight_shape"] = TensorSpec.of(("I64", "I32"), (2,))
        else:
            specs["weight"] = TensorSpec.of(("F8_E4M3" if self.is_float else "I8",), (rows, columns))
        specs["weight_zero_point"] = self._zero_points(rows, columns, scales)
        if self.has_group_order:
            specs["weight_g_idx"] = TensorSpec.of(("I32", "I64"), (columns,))
        if self.has_input_scale:
            specs["input_scale"] = TensorSpec.of(FLOAT_DTYPES, (1,), ())
            specs["input_zero_point"] = TensorSpec.of(("I8", "F8_E4M3", *FLOAT_DTYPES), (1,), (), is_optional=True)
        return specs

    def _zero_points(self, rows: int, columns: int, scales: tuple[tuple[int, ...], ...]) -> TensorSpec:
        # Of symmetric weights some versions stored them nevertheless; they must be 0 then.
        dtypes = ("I8", "F8_E4M3", *FLOAT_DTYPES) if self.is_float else ("I8",)
        plain = TensorSpec.of(dtypes, *scales, is_optional=self.is_symmetric)
        if not self.is_packed or self.strategy == "tensor":
            return plain
        shape = (math.ceil(rows * self.num_bits / 32), num_groups(columns, self.group_size))
        return TensorSpec((*plain.forms, ("I32", shape)), plain.is_optional)


@dataclass(frozen=True, slots=True)
class _Group:
    targets: LayerTargets
    format: CompressedFormat


class CompressedTensorsConfig:
    """Formats by layer."""

    method = "compressed-tensors"

    def __init__(self, groups: list[_Group], ignored: LayerTargets) -> None:
        self._groups = groups
        self._ignored = ignored

    def format_of(self, layer: str, kind: LayerKind) -> CompressedFormat | None:
        """Returns the format of the first group that names the layer, else of the first that names its class."""
        if self._ignored.matches(layer, kind):
            return None
        named = (group.format for group in self._groups if group.targets.matches_name(layer))
        of_class = (group.format for group in self._groups if group.targets.matches_class(kind))
        return next(named, None) or next(of_class, None)


def parse_compressed_tensors(config: ConfigReader, where: str) -> CompressedTensorsConfig:
    """Reads `quantization_config` of a config.json.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: it asks for what is not served.
    """
    _refuse_other_compression(config, where)
    values = config.mapping("config_groups")
    if not values or len(values) > _MAX_GROUPS:
        raise ConfigError(f"{where}: config_groups must be an object of 1 to {_MAX_GROUPS} groups")
    groups = [
        _group(_object(value, f"{where}: config_groups.{name[:40]}"), config, f"{where}: config_groups.{name[:40]}")
        for name, value in values.items()
    ]
    return CompressedTensorsConfig(groups, LayerTargets(config.strings("ignore"), f"{where}: ignore"))


def _refuse_other_compression(config: ConfigReader, where: str) -> None:
    sparsity = ConfigReader(config.mapping("sparsity_config"), f"{where}: sparsity_config")
    sparse_format = sparsity.string("format", "dense")
    if sparse_format != "dense":
        raise UnsupportedModelError(f"{where}: sparse weights ({sparse_format[:40]!r}) are not supported")
    if ConfigReader(config.mapping("transform_config"), where).mapping("config_groups"):
        raise UnsupportedModelError(f"{where}: transform_config is not supported: rotations are computed in no layer")
    status = config.string("quantization_status", "compressed")
    if status != "compressed":
        raise UnsupportedModelError(
            f"{where}: quantization_status {status[:40]!r} is not supported, only 'compressed' is; save the "
            "checkpoint with save_compressed=True"
        )


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be an object with targets and weights")
    return cast("dict[str, Any]", value)


def _group(values: Mapping[str, Any], config: ConfigReader, where: str) -> _Group:
    group = ConfigReader(values, where)
    if group.mapping("output_activations"):
        raise UnsupportedModelError(f"{where}: output_activations are not supported")
    targets = group.strings("targets")
    if not targets:
        raise ConfigError(f"{where}: targets must name layers, or classes such as Linear")
    if not group.mapping("weights"):
        raise UnsupportedModelError(f"{where} has no weights: rounding inputs alone is not supported")
    weights = ConfigReader(group.mapping("weights"), f"{where}.weights")
    inputs = ConfigReader(group.mapping("input_activations"), f"{where}.input_activations")
    default = config.string("format", "")
    stored = group.string("format", "" if default == "mixed-precision" else default)
    format_ = _format(weights, inputs, stored, where, has_inputs=bool(group.mapping("input_activations")))
    return _Group(LayerTargets(targets, f"{where}: targets"), format_)


def _format(
    weights: ConfigReader, inputs: ConfigReader, stored: str, where: str, *, has_inputs: bool
) -> CompressedFormat:
    is_float = weights.string("type", "int").lower() == "float"
    num_bits = weights.integer("num_bits", 8, high=64)
    stored = stored or ("float-quantized" if is_float else "int-quantized" if has_inputs else _PACKED)
    is_packed = stored == _PACKED
    allowed = (8,) if is_float else (2, 4, 8) if is_packed else (4, 8)
    if stored not in _FORMATS or num_bits not in allowed or (is_packed and is_float):
        name = f"{'float' if is_float else 'int'}{num_bits} weights as {stored[:40]!r}"
        raise UnsupportedModelError(f"{where}: {name} are not supported; supported are {_SUPPORTED}")
    strategy, group_size, block = _strategy(weights, where)
    is_symmetric = weights.boolean("symmetric", True)
    if is_float and not is_symmetric:
        raise UnsupportedModelError(f"{where}: fp8 weights with zero points are not supported")
    if weights.value("dynamic") not in (None, False):
        raise UnsupportedModelError(f"{where}: weights.dynamic is not supported: scales of weights are stored")
    rounding, is_static = _inputs(inputs, has_inputs=has_inputs)
    is_served = _is_rounding_served(rounding, is_float, num_bits, strategy, block, is_static=is_static)
    return CompressedFormat(
        num_bits=num_bits,
        is_float=is_float,
        is_packed=is_packed,
        strategy=strategy,
        group_size=group_size,
        block=block,
        is_symmetric=is_symmetric,
        has_group_order=_has_group_order(weights, where),
        inputs=rounding if is_served else None,
        has_input_scale=is_static,
    )


def _strategy(weights: ConfigReader, where: str) -> tuple[str, int | None, tuple[int, int] | None]:
    """Returns the strategy, the group size, and the block."""
    group_size = None if weights.value("group_size") is None else weights.integer("group_size", low=-1, high=2**20)
    default = "tensor" if group_size is None else "group" if group_size > 0 else "channel"
    strategy = weights.string("strategy", default).lower()
    if strategy in ("tensor", "channel"):
        return strategy, None, None
    if strategy == "group":
        if group_size is None or group_size < 1:
            raise ConfigError(f"{where}: weights.group_size must be positive with strategy group")
        _check_step(group_size, where)
        return strategy, group_size, None
    block = weights.integers("block_structure") if strategy == "block" else []
    is_float = weights.string("type", "int").lower() == "float"
    if not is_float or len(block) != 2 or min(block) < 1 or max(block) > 2**20:
        raise UnsupportedModelError(
            f"{where}: weights.strategy {strategy[:40]!r} is not supported; supported are {_SUPPORTED}"
        )
    _check_step(block[1], where)
    return strategy, None, (block[0], block[1])


def _check_step(size: int, where: str) -> None:
    if size % GROUP_STEP:
        raise UnsupportedModelError(
            f"{where}: groups of {size} inputs are not supported, only multiples of {GROUP_STEP} are"
        )


def _has_group_order(weights: ConfigReader, where: str) -> bool:
    order = weights.value("actorder")
    if order in (None, False, "weight", "static"):
        return False
    if order in (True, "group", "dynamic"):
        return True
    raise ConfigError(f"{where}: weights.actorder must be group, weight or null")


def _inputs(inputs: ConfigReader, *, has_inputs: bool) -> tuple[Rounding | None, bool]:
    """Returns what inputs are to be rounded to, and whether their scale is stored.

    None where no kernel has that rounding: inputs then stay as they are, which is finer.
    """
    if not has_inputs:
        return None, False
    is_float = inputs.string("type", "int").lower() == "float"
    is_static = inputs.value("dynamic") in (None, False)
    has_form = inputs.integer("num_bits", 8, high=64) == 8 and inputs.boolean("symmetric", True)
    is_static_tensor = inputs.string("strategy", "tensor").lower() == "tensor"
    if not has_form or (is_static and not is_static_tensor):
        return None, is_static
    return ("fp8" if is_float else "int8"), is_static


def _is_rounding_served(
    rounding: Rounding | None,
    is_float: bool,
    num_bits: int,
    strategy: str,
    block: tuple[int, int] | None,
    *,
    is_static: bool,
) -> bool:
    """Whether weight and inputs are of one kind, and their scales lie as kernels want them."""
    if rounding is None or num_bits != 8 or is_float != (rounding == "fp8"):
        return False
    return strategy in ("tensor", "channel") or (block == (128, 128) and is_float and not is_static)
