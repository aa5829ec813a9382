# SPDX-License-Identifier: Apache-2.0
"""How a quantization method stores the weight of one layer: which tensors, of which dtypes and shapes. Without torch.

Everything follows from config.json and the layer's sizes, so that a checkpoint is compared with it before a weight is
read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

# N = outputs of a layer, K = inputs.

LayerKind = Literal["Linear", "Embedding"]
"""What config files call the classes of layers that can be quantized."""

FLOAT_DTYPES = ("F32", "F16", "BF16")
MAX_TEXT_BYTES = 4096
# Kernels want groups of a multiple of so many inputs.
GROUP_STEP = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor of a quantized layer may look like.

    Attributes:
        forms: pairs of a dtype, as safetensors spells it, and a shape; it must be of one of them.
        is_optional: the layer may lack it.
        is_text: the shape is one dimension of up to MAX_TEXT_BYTES.
    """

    forms: tuple[tuple[str, tuple[int, ...]], ...]
    is_optional: bool = False
    is_text: bool = False

    @classmethod
    def of(cls, dtypes: Iterable[str], *shapes: tuple[int, ...], is_optional: bool = False) -> TensorSpec:
        """Returns the spec of a tensor of any of the dtypes, in any of the shapes."""
        return cls(tuple(product(dtypes, shapes)), is_optional)

    @classmethod
    def text(cls, *, is_optional: bool = False) -> TensorSpec:
        """Returns the spec of bytes that are a text."""
        return cls((("U8", (MAX_TEXT_BYTES,)),), is_optional, is_text=True)

    def allows_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of any of the dtypes may have this shape."""
        if self.is_text:
            return len(shape) == 1 and shape[0] <= MAX_TEXT_BYTES
        return any(shape == allowed for _, allowed in self.forms)

    def allows(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this dtype and shape is what is wanted."""
        if self.is_text:
            return dtype == "U8" and self.allows_shape(shape)
        return (dtype, shape) in self.forms


class StoredFormat(Protocol):
    """How the weight [N, K] of a layer is stored. Hashable: layers of one format are counted together."""

    def describe(self) -> str:
        """Returns its scheme in the words of the field, for the log: `w4a16, groups of 128`."""
        ...

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Returns the tensors that the weight [rows, columns] is stored in, by what follows the layer's name.

        Raises:
            CheckpointError: a weight of these sizes cannot be stored so.
        """
        ...


class QuantizationConfig(Protocol):
    """Which layers of a checkpoint are quantized, and how."""

    @property
    def method(self) -> str:
        """As config.json names it."""
        ...

    def format_of(self, layer: str, kind: LayerKind) -> StoredFormat | None:
        """Returns how the weight of `layer` is stored; None: as it is everywhere else.

        Args:
            layer: its name in checkpoints: `model.layers.0.self_attn.q_proj`.
        """
        ...


def num_groups(columns: int, group_size: int | None) -> int:
    """Returns into how many groups a row of so many columns falls; None: it is one."""
    return 1 if group_size is None else math.ceil(columns / group_size)
