# SPDX-License-Identifier: Apache-2.0
"""Projections of experts as source/quantized_moe.h wants them: a quantized weight for each, in panels of its own."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from wavetrain_kernels.cpu.library import Library
from wavetrain_kernels.cpu.quantized_linear import Format, PackedPanels, address, is_supported
from wavetrain_kernels.errors import DtypeError
from wavetrain_kernels.quantized_weight import QuantizedWeight

# E = experts.

_BLOCK = 32
_LINE_BYTES = 64


class _Weight(ctypes.Structure):
    """`ExpertWeight`."""

    _fields_ = (
        ("format", Format),
        ("packed", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
    )


class Stack(ctypes.Structure):
    """`ExpertStack`."""

    _fields_ = (
        ("format", Format),
        ("dense", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
    )


class ExpertPanels:
    """One projection of all experts, packed one by one."""

    def __init__(self, num_experts: int, *, is_gated: bool) -> None:
        self.is_gated = is_gated
        self._packed: list[PackedPanels | None] = [None] * num_experts
        self._table = (_Weight * num_experts)()

    @classmethod
    def empty(cls, num_experts: int, like: QuantizedWeight, is_gated: bool) -> ExpertPanels | None:
        """Returns a place for so many experts; None where there are no kernels for weights like that one."""
        return cls(num_experts, is_gated=is_gated) if is_supported(like) else None

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def num_bytes(self) -> int:
        """Of the weights that are packed."""
        return sum(packed.panels.nbytes for packed in self._packed if packed is not None)

    def put(self, expert: int, packed: QuantizedWeight | PackedPanels | None) -> None:
        """Takes an expert's weight.

        Raises:
            DtypeError: it has values that there are no kernels for.
        """
        if not isinstance(packed, PackedPanels):
            raise DtypeError(f"the weight of expert {expert} has values that no kernel takes")
        self._packed[expert] = packed
        self._table[expert] = _Weight(
            packed.format, packed.panels.data_ptr(), address(packed.order), address(packed.input_scale)
        )

    def stack(self) -> Stack:
        """Returns what the library takes; its memory belongs to this object."""
        first = self._packed[0]
        assert first is not None and None not in self._packed, "all experts are packed before they are used"  # noqa: PT018
        return Stack(first.format, None, ctypes.addressof(self._table), address(first.codebook))


def dense_stack(packed: Tensor, num_outputs: int, num_inputs: int, *, is_gated: bool) -> Stack:
    """Returns experts of bfloat16, packed as `MoeKernels.empty_experts` has them, as a stack beside a quantized one."""
    fmt = Format(n=num_outputs, k=num_inputs, group_size=num_inputs, input_group_size=num_inputs, is_gated=is_gated)
    return Stack(fmt, packed.data_ptr(), None, None)


def scratch_bytes(
    library: Library, num_pairs: int, num_experts: int, num_units: int, stacks: tuple[Stack, Stack]
) -> int:
    """What `QuantizedMixture` lays out: where pairs are, their gated units, blocks of rows of either projection."""
    unit_bytes = _whole_lines(num_pairs * num_units * torch.bfloat16.itemsize)
    block_bytes = max(library.quantized_workspace(ctypes.byref(stack.format), _BLOCK) for stack in stacks)
    return index_bytes(num_pairs, num_experts) + unit_bytes + most_blocks(num_pairs, num_experts) * block_bytes


def index_bytes(num_pairs: int, num_experts: int) -> int:
    """What `Groups` of source/moe.h takes to say where pairs are."""
    return _whole_lines((2 * (num_experts + 1) + 2 * num_pairs) * 4)


def most_blocks(num_pairs: int, num_experts: int) -> int:
    """Returns how many blocks of rows there may be, as no expert shares one."""
    return min(num_pairs, (num_pairs + (_BLOCK - 1) * min(num_experts, num_pairs)) // _BLOCK)


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
