# SPDX-License-Identifier: Apache-2.0
"""The tensors that one quantized layer is stored in, read, and what may be wrong with their numbers.

Shapes and dtypes were compared with the format before; here are the checks that take the numbers. Every message names
the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wavetrain_engine.errors import CheckpointError
from wavetrain_kernels.ops import QuantizedWeight, dequantize

# N = outputs of the layer, K = inputs, G = groups of inputs.

_KERNEL_BLOCK_ROWS = 128
_ROWS_AT_ONCE = 1024  # a multiple of every block's rows that kernels know


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """What was read of one layer.

    Attributes:
        layer: its name in the checkpoint.
        tensors: by what follows that name; those that are optional may be missing.
    """

    layer: str
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """Returns a tensor; None: the layer lacks it."""
        return self.tensors.get(name)

    def wrong(self, name: str, why: str) -> CheckpointError:
        """Returns the error for a tensor's numbers."""
        shown = self.layer if self.layer.isprintable() else ascii(self.layer)
        return CheckpointError(f"{shown}.{name} {why}; is the checkpoint whole, and config.json its own?")

    def scales(self, name: str, *, is_positive: bool = False) -> Tensor:
        """Returns scales in float32.

        Raises:
            CheckpointError: one is not finite, or is negative where that makes no sense.
        """
        scales = self[name].float()
        if not scales.isfinite().all():
            raise self.wrong(name, "holds scales that are not finite")
        if is_positive and (scales < 0).any():
            raise self.wrong(name, "holds negative scales")
        return scales

    def input_scale(self, name: str = "input_scale") -> Tensor:
        """Returns the one scale of the inputs, [1] in float32.

        Raises:
            CheckpointError: it is not positive and finite.
        """
        scale = self.scales(name).view(1)
        if scale.item() <= 0:
            raise self.wrong(name, "must be positive")
        return scale

    def column_order(self, name: str, group_size: int, num_columns: int) -> Tensor | None:
        """Returns the order in which inputs fall into their groups, [K] int64; None: the order they come in.

        Raises:
            CheckpointError: an input's group does not exist, or groups are not of one size.
        """
        groups = self[name].long()
        num_groups = -(-num_columns // group_size)
        if (groups == -1).all():  # compressed-tensors: there was no order
            return None
        if (groups < 0).any() or (groups >= num_groups).any():
            raise self.wrong(name, f"names groups that do not exist: there are {num_groups}")
        in_order = torch.arange(num_columns, device=groups.device)
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], in_order // group_size):
            raise self.wrong(name, f"does not give every group its {group_size} inputs")
        return None if torch.equal(order, in_order) else order

    def check_zeros(self, name: str) -> None:
        """Checks that zero points which must not be there are 0 where they are.

        Raises:
            CheckpointError: one is not.
        """
        zeros = self.get(name)
        if zeros is not None and zeros.float().ne(0).any():
            raise self.wrong(name, "holds zero points, but config.json says that there are none")

    def check_weight(self, weight: QuantizedWeight, *, scale: str, zeros: Tensor | None = None) -> QuantizedWeight:
        """Returns the weight.

        Args:
            scale: the name of the tensor of scales.
            zeros: what `weight.offsets` are in codes: [N, G].

        Raises:
            CheckpointError: a group has scale 0, but not all of its values are 0; or a value or offset is not finite.
        """
        largest = 448.0 if weight.scheme.values == "fp8" else 256.0
        if not (weight.scales * largest).isfinite().all():
            raise self.wrong(scale, "holds scales so large that weights are not finite")
        if weight.scheme.values == "fp8" and (weight.values.view(torch.uint8) & 0x7F).eq(0x7F).any():
            raise self.wrong("weight", "holds values that are not a number")
        is_zero = weight.scales == 0
        if is_zero.any() and _has_values(weight, is_zero, zeros):
            raise self.wrong(scale, "holds scales of 0 for values that are not 0")
        return weight


def block_grid(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> tuple[int, int, Tensor]:
    """Returns the group size, the rows of a block and the scales of a weight with a scale for each block.

    Kernels know blocks of 128 rows; of others, each row gets the scale of its block.
    """
    block_rows, group_size = block
    if block_rows != _KERNEL_BLOCK_ROWS:
        block_rows, scales = 1, scales.repeat_interleave(block_rows, 0)[:rows]
    return min(group_size, columns), block_rows, scales


def _has_values(weight: QuantizedWeight, is_zero: Tensor, zeros: Tensor | None) -> bool:
    """Whether a group with scale 0 has a value that would not be 0 with another scale."""
    scales = is_zero.float()
    offsets = None if weight.offsets is None else torch.zeros_like(scales) if zeros is None else zeros * scales
    block_rows = weight.scheme.block_rows
    for start in range(0, weight.out_features, _ROWS_AT_ONCE):
        grid = slice(start // block_rows, -(-(start + _ROWS_AT_ONCE) // block_rows))
        if not is_zero[grid].any():
            continue
        part = replace(
            weight,
            values=weight.values[start : start + _ROWS_AT_ONCE],
            scales=scales[grid],
            offsets=None if offsets is None else offsets[grid],
        )
        if dequantize(part).ne(0).any():
            return True
    return False
