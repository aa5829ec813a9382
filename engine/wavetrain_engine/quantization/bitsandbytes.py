# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a bitsandbytes layer to its weight; `bitsandbytes_config` describes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.quantization.bitsandbytes_config import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    EightBitFormat,
    FourBitFormat,
)
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_engine.quantization.stored_format import GROUP_STEP
from wavetrain_kernels.ops import QuantizationScheme, QuantizedWeight

_LARGEST_INT8 = 127.0
_ABSMAX = "weight.absmax"


def decode_8bit(_stored: EightBitFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns]: int8 times SCB / 127.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    layout = tensors.get("weight_format")
    if layout is not None and layout.item() != 0:
        raise tensors.wrong("weight_format", f"is {layout.item()}: only rows, 0, are read")
    weight = QuantizedWeight(
        scheme=QuantizationScheme(values="int8", group_size=columns),
        in_features=columns,
        values=tensors["weight"],
        scales=(tensors.scales("SCB", is_positive=True) / _LARGEST_INT8).view(rows, 1),
    )
    return tensors.check_weight(weight, scale="SCB")


def decode_4bit(stored: FourBitFormat, tensors: LayerTensors, rows: int, columns: int) -> QuantizedWeight:
    """Returns the weight [rows, columns].

    Blocks go on from one row to the next; where a row's length is no multiple of theirs, groups are as long as both
    are multiples of.

    Raises:
        CheckpointError: the tensors contradict each other or the format.
    """
    state = _State.read(stored, tensors)
    block_size = state.block_size
    if block_size not in BLOCK_SIZES or state.shape != [rows, columns]:
        raise tensors.wrong(stored.state, f"does not describe {rows} x {columns} values in blocks of {BLOCK_SIZES}")
    absmax = _nested_scales(state, stored, tensors) if stored.is_nested else tensors.scales(_ABSMAX)
    if absmax.shape[0] != math.ceil(rows * columns / block_size):
        raise tensors.wrong(_ABSMAX, f"has {absmax.shape[0]} scales for blocks of {block_size}")
    codebook = tensors.scales("weight.quant_map")
    group_size = math.gcd(columns, block_size)
    if group_size % GROUP_STEP:
        raise tensors.wrong("weight", f"has rows of {columns}, which blocks of {block_size} do not fit")
    starts = torch.arange(0, rows * columns, group_size, device=absmax.device)
    codes = tensors["weight"].contiguous().view(-1).view(torch.uint8).view(rows, columns // 2)
    weight = QuantizedWeight(
        scheme=QuantizationScheme(values="int4", group_size=group_size, has_codebook=True),
        in_features=columns,
        values=codes >> 4 | codes << 4,  # the first of two is in the high half
        scales=absmax[starts // block_size].view(rows, -1),
        codebook=codebook,
    )
    return tensors.check_weight(weight, scale=_ABSMAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What a layer says of itself."""

    block_size: int
    shape: list[int]
    nested_block_size: int
    nested_offset: float

    @classmethod
    def read(cls, stored: FourBitFormat, tensors: LayerTensors) -> _State:
        """Parses the layer's JSON."""
        try:
            values: Any = json.loads(bytes(tensors[stored.state].cpu().tolist()).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise tensors.wrong(stored.state, "is not valid JSON") from error
        if not isinstance(values, dict) or cast("dict[str, Any]", values).get("quant_type") != stored.kind:
            raise tensors.wrong(stored.state, f"does not describe {stored.kind} values")
        reader = ConfigReader(cast("dict[str, Any]", values), stored.state)
        try:
            return cls(
                block_size=reader.integer("blocksize", high=2**20),
                shape=reader.integers("shape"),
                nested_block_size=reader.integer("nested_blocksize", NESTED_BLOCK_SIZE, high=2**20),
                nested_offset=reader.number("nested_offset", 0.0, low=-1e30, high=1e30),
            )
        except ConfigError as error:
            raise tensors.wrong(stored.state, f"is wrong: {error}") from error


def _nested_scales(state: _State, stored: FourBitFormat, tensors: LayerTensors) -> Tensor:
    """Returns the scales [blocks] in float32."""
    if state.nested_block_size != NESTED_BLOCK_SIZE:
        raise tensors.wrong(stored.state, f"has nested blocks that are not of {NESTED_BLOCK_SIZE}")
    codes = tensors[_ABSMAX]
    outer = tensors.scales("weight.nested_absmax")
    if outer.shape[0] != math.ceil(codes.shape[0] / NESTED_BLOCK_SIZE):
        raise tensors.wrong("weight.nested_absmax", f"has {outer.shape[0]} scales for {codes.shape[0]} scales")
    inner = tensors.scales("weight.nested_quant_map")[codes.long()]
    absmax = inner * outer.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.shape[0]] + state.nested_offset
    if not absmax.isfinite().all():
        raise tensors.wrong(_ABSMAX, "holds scales that are not finite")
    return absmax
