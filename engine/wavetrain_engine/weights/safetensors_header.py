# SPDX-License-Identifier: Apache-2.0
"""What a safetensors file says it holds, checked against the file itself, without reading a tensor and without torch.

    8 bytes: N, little endian | N bytes: JSON, name → {dtype, shape, data_offsets} | the tensors, without gaps

In a file that passes every tensor lies inside it. One that was cut off by an interrupted download does not pass, and
is refused here by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, cast

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.tensor_entry import TensorEntry

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16

_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


def read_header(path: Path) -> list[TensorEntry]:
    """Returns the tensors of a safetensors file, in the order they lie in it.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or is not a sound safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise CheckpointError(f"{path.name} is a Git LFS pointer, not the weights: run git lfs pull")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"its header would take {length} bytes of a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
    try:
        header: object = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    described = {name: value for name, value in cast("dict[str, Any]", header).items() if name != "__metadata__"}
    entries = [_entry(path, name, value) for name, value in described.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_extent(path, entries, size - 8 - length)
    return [replace(entry, begin=entry.begin + 8 + length, end=entry.end + 8 + length) for entry in entries]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict):
        raise _broken(path, f"tensor {_shown(name)} has no description")
    values = cast("dict[str, Any]", value)
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _broken(path, f"tensor {_shown(name)} has unknown dtype {_shown(dtype)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {_shown(name)} has no valid shape and data_offsets")
    entry = TensorEntry(path, name, dtype, tuple(shape), offsets[0], offsets[1])
    if math.prod(entry.shape) * _DTYPE_BITS[dtype] != entry.num_bytes * 8:
        size = f"{dtype} {_shown(shape)} cannot take {entry.num_bytes} bytes"
        raise _broken(path, f"tensor {_shown(name)} of {size}")
    return entry


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    # Bounded, so that their product is cheap and whoever reads the file next can hold them.
    if not isinstance(value, list) or len(cast("list[Any]", value)) > _MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in cast("list[Any]", value))


def _check_extent(path: Path, entries: list[TensorEntry], data_bytes: int) -> None:
    """Checks that the tensors fill the rest of the file exactly, one after the other."""
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise _broken(path, f"tensor {_shown(entry.name)} does not follow the one before it")
        position = entry.end
    if position > data_bytes:
        raise CheckpointError(
            f"{path.name} is truncated: its header describes {position} bytes of tensors, the file has {data_bytes}; "
            "download or copy it again"
        )
    if position < data_bytes:
        raise _broken(path, f"{data_bytes - position} bytes at its end belong to no tensor")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is truncated or not a safetensors file: {why}; download or copy it again")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
