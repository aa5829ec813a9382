# SPDX-License-Identifier: Apache-2.0
"""GGUF's tensor types: how their blocks are sized and decoded, as the gguf package knows it.

The only user of that package, and only where a GGUF file is read: importing it takes 50 ms, and numpy as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

DENSE_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type's name in the format's own spelling; the values of one block, and its bytes."""

    name: str
    num_values: int
    num_bytes: int

    @classmethod
    def of_id(cls, type_id: int) -> BlockType:
        """Returns the type that a file has by number.

        Raises:
            KeyError: there is none.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError as error:
            raise KeyError(type_id) from error
        return cls(kind.name, *GGML_QUANT_SIZES[kind])

    @classmethod
    def of_name(cls, name: str) -> BlockType:
        """Returns the type of a name. Raises as `of_id`."""
        from gguf.constants import GGMLQuantizationType

        return cls.of_id(GGMLQuantizationType[name])


def can_decode(name: str) -> bool:
    """Whether blocks of a type can be decoded; the package has no list of those, so one block is tried."""
    import numpy as np

    try:
        decode(np.zeros((1, BlockType.of_name(name).num_bytes), dtype=np.uint8), name)
    except NotImplementedError:
        return False
    return True


def decode(rows: Any, name: str) -> Any:
    """Returns the numbers, float32 [rows, columns], of rows of blocks, uint8 [rows, bytes], of a type."""
    import numpy as np
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    dequantize = cast("Any", quants).dequantize
    with np.errstate(all="ignore"):  # scales that are no numbers are the caller's to find in the result
        return dequantize(rows, GGMLQuantizationType[name])
