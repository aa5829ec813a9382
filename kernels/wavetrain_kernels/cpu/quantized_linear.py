# SPDX-License-Identifier: Apache-2.0
"""Linear layers over quantized weights packed once at load, for bfloat16 inputs. Other dtypes go to the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.cpu.memory import HugePool
from wavetrain_kernels.quantized_weight import QuantizationScheme, QuantizedWeight
from wavetrain_kernels.reference import quantized_linear as reference

# M = rows, K = inputs, N = outputs.

_ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}
_VALUES = {"int4": 0, "int8": 2, "fp8": 3}
_CODEBOOK = 1
_SEGMENT = 16
# Sums of more products of bytes, those of a group, could leave 31 bits: see source/quantized_integers.h.
_MOST_INT_INPUTS = 66_000


class Format(ctypes.Structure):
    """`QuantizedFormat` of source/quantized_format.h."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("input_group_size", ctypes.c_int64),
        ("values", ctypes.c_int32),
        ("has_int_inputs", ctypes.c_int32),
        ("has_offsets", ctypes.c_int32),
        ("has_half_scales", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PackedPanels:
    """A quantized weight in panels, and what is needed beside them. Rows of bfloat16 are multiplied with it."""

    format: Format
    panels: Tensor
    codebook: Tensor | None
    order: Tensor | None
    input_scale: Tensor | None


class QuantizedLinearKernels:
    """The functions of one compiled library for quantized weights."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._memory = HugePool()

    def pack_quantized(
        self, weight: QuantizedWeight, dtype: torch.dtype, is_gated: bool
    ) -> QuantizedWeight | PackedPanels | None:
        """Returns the weight in panels, in memory of its own; None where there are no kernels for it."""
        if dtype != torch.bfloat16:
            return reference.pack_quantized(weight, dtype, is_gated)
        if not is_supported(weight):
            return None
        fmt, scales, offsets = _format_of(weight, is_gated)
        packed = self._memory.empty(self._library.quantized_bytes(ctypes.byref(fmt)), torch.uint8)
        values = weight.values.contiguous()
        self._library.pack_quantized(
            packed.data_ptr(),
            ctypes.byref(fmt),
            values.data_ptr(),
            scales.data_ptr(),
            address(offsets),
            weight.scheme.block_rows,
        )
        order = None if weight.column_order is None else weight.column_order.to(torch.int32)
        return PackedPanels(fmt, packed, weight.codebook, order, weight.input_scale)

    def quantized_linear(
        self, out: Tensor, x: Tensor, packed: QuantizedWeight | PackedPanels, bias: Tensor | None
    ) -> None:
        """out [M, N] = x [M, K] times the weight transposed, plus bias [N]; out is bfloat16 or float32."""
        if isinstance(packed, QuantizedWeight):
            reference.quantized_linear(out, x, packed, bias)
        else:
            self._run(out, x, packed, bias, 0)

    def quantized_gated_linear(
        self, out: Tensor, x: Tensor, packed: QuantizedWeight | PackedPanels, bias: Tensor | None, activation: str
    ) -> None:
        """out [M, N / 2] = act(first half of the outputs) times the second half."""
        if isinstance(packed, QuantizedWeight):
            reference.quantized_gated_linear(out, x, packed, bias, activation)
        else:
            self._run(out, x, packed, bias, _ACTIVATIONS[activation])

    def _run(self, out: Tensor, x: Tensor, packed: PackedPanels, bias: Tensor | None, activation: int) -> None:
        num_rows = x.shape[0]
        if not num_rows:
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        library, fmt = self._library, ctypes.byref(packed.format)
        library.quantized_linear(
            out.data_ptr(),
            x.data_ptr(),
            packed.panels.data_ptr(),
            address(bias),
            library.scratch(library.quantized_workspace(fmt, num_rows)),
            fmt,
            address(packed.codebook),
            address(packed.order),
            address(packed.input_scale),
            out.stride(0),
            x.stride(0),
            num_rows,
            activation,
            out.dtype == torch.float32,
        )


def is_supported(weight: QuantizedWeight) -> bool:
    """Whether there are kernels for the weight."""
    scheme, num_inputs = weight.scheme, weight.in_features
    group = _group_size(scheme, num_inputs)
    if group < num_inputs and group % _SEGMENT:
        return False
    if scheme.inputs == "int8":
        inputs = min(scheme.input_group_size or num_inputs, num_inputs)
        are_integers = scheme.values != "fp8" and not scheme.has_codebook
        return are_integers and group <= _MOST_INT_INPUTS and (inputs == num_inputs or inputs % group == 0)
    # NaN as a value is the only one that no table of e4m3 has.
    return scheme.values != "fp8" or not bool((weight.values.view(torch.uint8) & 0x7F == 0x7F).any())


def _group_size(scheme: QuantizationScheme, num_inputs: int) -> int:
    """Inputs that share a scale, of the weight and of x."""
    inputs = scheme.input_group_size
    is_finer = inputs is not None and (scheme.group_size >= num_inputs or scheme.group_size % inputs == 0)
    size = inputs if scheme.inputs == "int8" and inputs is not None and is_finer else scheme.group_size
    return min(size, num_inputs)


def _format_of(weight: QuantizedWeight, is_gated: bool) -> tuple[Format, Tensor, Tensor | None]:
    """Returns how the weight is packed, and its scales and offsets for each group of that."""
    scheme, num_inputs = weight.scheme, weight.in_features
    group = _group_size(scheme, num_inputs)
    columns = torch.arange(-(-num_inputs // group)) * group // min(scheme.group_size, num_inputs)
    scales = weight.scales[:, columns].contiguous()
    offsets = None if weight.offsets is None else weight.offsets[:, columns].contiguous()
    has_int_inputs = scheme.inputs == "int8"
    fmt = Format(
        n=weight.out_features,
        k=num_inputs,
        group_size=group,
        input_group_size=min(scheme.input_group_size or num_inputs, num_inputs),
        values=_CODEBOOK if scheme.has_codebook else _VALUES[scheme.values],
        has_int_inputs=has_int_inputs,
        has_offsets=scheme.has_offsets,
        has_half_scales=bool((scales.half().float() == scales).all()),
        is_gated=is_gated,
    )
    return fmt, scales, offsets


def address(tensor: Tensor | None) -> int | None:
    """Returns where a tensor's elements are; None: there is none."""
    return None if tensor is None else tensor.data_ptr()
