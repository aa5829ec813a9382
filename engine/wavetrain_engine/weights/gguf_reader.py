# SPDX-License-Identifier: Apache-2.0
"""From a GGUF file into memory: as numbers of a model's dtype, or as the quantized weights they are.

Numbers are those of the gguf package, bit for bit, before they are rounded to the dtype that is wanted. Files are read,
not mapped, for the reasons of `tensor_reader`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.block_types import BlockType, decode
from wavetrain_engine.gguf.metadata import shown
from wavetrain_engine.weights.gguf_blocks import repack
from wavetrain_engine.weights.gguf_tensors import GgufTensor
from wavetrain_kernels.quantized_weight import QuantizedWeight

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Rows are decoded a few at a time: the library's numbers are float32, and some of its steps need more.
_VALUES_AT_ONCE = 2**22


def read_dense(tensor: GgufTensor, out: Tensor) -> None:
    """Fills `out`, of the tensor's shape and any device, converting to its dtype.

    Raises:
        CheckpointError: the file cannot be read or is shorter than it was; a scale is not finite.
    """
    rows = tensor.shape[0]
    step = rows if tensor.num_heads else max(_VALUES_AT_ONCE * rows // out.numel(), 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = _decode(_read_rows(tensor, start, stop), tensor)
        if tensor.added:
            values = values.float() - tensor.added
        out[start:stop].copy_(values.view(stop - start, *tensor.shape[1:]))


def read_quantized(tensor: GgufTensor) -> QuantizedWeight | None:
    """Returns a matrix as it is quantized, on the CPU; None: its type has no form that kernels take.

    Raises:
        CheckpointError: as `read_dense`.
    """
    if not tensor.is_quantized or len(tensor.shape) != 2 or tensor.added:
        return None
    rows = _read_rows(tensor, 0, tensor.shape[0])
    weight = repack(rows.unflatten(1, (-1, BlockType.of_name(tensor.dtype).num_bytes)), tensor.dtype)
    if weight is None:
        return None
    for numbers in (weight.scales, weight.offsets):
        if numbers is not None and not numbers.isfinite().all():
            raise _not_finite(tensor)
    return weight


def _read_rows(tensor: GgufTensor, start: int, stop: int) -> Tensor:
    """Returns rows [start, stop) as bytes [rows, bytes of a row], in the order of a checkpoint."""
    row_bytes = tensor.num_bytes // tensor.shape[0]
    raw = torch.empty(stop - start, row_bytes, dtype=torch.uint8)
    view = raw.view(-1).numpy().data
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin + start * row_bytes)
            num_bytes = file.readinto(view)
    except OSError as error:
        raise CheckpointError(f"cannot read {tensor.file.name}: {error.strerror}") from error
    if num_bytes != len(view):
        raise CheckpointError(f"{tensor.file.name} became shorter while it was read; load the model again")
    if tensor.num_heads:
        # Of each head: value 0 of the first half, value 0 of the second, value 1 of the first, ...
        raw = raw.view(tensor.num_heads, -1, 2, row_bytes).transpose(1, 2).reshape(-1, row_bytes)
    return raw


def _decode(rows: Tensor, tensor: GgufTensor) -> Tensor:
    """Returns [rows, columns] numbers."""
    if not tensor.is_quantized:
        return rows.view(_DTYPES[tensor.dtype])
    values = decode(rows.numpy(), tensor.dtype)
    if not np.isfinite(values).all():
        raise _not_finite(tensor)
    return torch.from_numpy(values)


def _not_finite(tensor: GgufTensor) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file.name}: tensor {shown(tensor.name)} has a scale that is no finite number; download it again"
    )
