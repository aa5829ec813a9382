# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says it holds, checked against the file itself, without reading a tensor and without torch.

    "GGUF" | version | counts | metadata: key, type, value | tensors: name, shape, type, offset | padding | the tensors

In a file that passes every tensor lies inside it, alone. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md;
as there, the innermost dimension comes first in the file. Here shapes are [rows, columns], as in a checkpoint.

The gguf package knows the types of tensors (`block_types`); its reader is not used, as it maps the file and takes sizes
on trust.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.block_types import BlockType
from wavetrain_engine.gguf.byte_cursor import ByteCursor
from wavetrain_engine.gguf.metadata import Metadata, shown
from wavetrain_engine.tensor_entry import TensorEntry

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_FILES = 1000
# Ten times those of the models with most experts, each a tensor of its own in old files.
_MAX_TENSORS = 2**17
_ALIGNMENT = "general.alignment"
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF checkpoint: its metadata, and its tensors by the names they have there, in the order they lie."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Reads the head of `path`, and of the files it is split into, if any.

        Raises:
            CheckpointError: a file cannot be read, is truncated, lies about what it holds or is no GGUF file; a part
                of a split file is missing.
        """
        first = _open_one(path)
        count = first.metadata.integer("split.count", 0)
        if count <= 1:
            return first
        return _join(first, _split_paths(path, first.metadata, count))


def _join(first: GgufFile, paths: list[Path]) -> GgufFile:
    tensors = dict(first.tensors)
    for number, path in enumerate(paths[1:], 1):
        part = _open_one(path)
        if part.metadata.integer("split.no") != number or part.metadata.integer("split.count") != len(paths):
            raise CheckpointError(f"{path.name} is not part {number + 1} of {len(paths)}; download it again")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor {shown(name)} is in {tensors[name].file.name} and in {path.name}")
            tensors[name] = tensor
    wanted = first.metadata.integer("split.tensors.count", len(tensors))
    if len(tensors) != wanted:
        raise CheckpointError(f"the parts of {first.path.name} hold {len(tensors)} tensors instead of {wanted}")
    return GgufFile(first.path, first.metadata, tensors)


def _split_paths(path: Path, metadata: Metadata, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or count > _MAX_FILES:
        raise CheckpointError(
            f"{path.name} is one of {count} parts, and its name is not of the form name-00001-of-{count:05d}.gguf by "
            "which the others are found; rename them, or merge them with llama-gguf-split --merge"
        )
    paths = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if metadata.integer("split.no", 0) != 0 or path != paths[0]:
        raise CheckpointError(f"{path.name} is a later part of a split file; give the first, {paths[0].name}")
    missing = [item.name for item in paths if not item.is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} of {count} parts are missing: {missing[0]}; download them again")
    return paths


def _open_one(path: Path) -> GgufFile:
    name = path.name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            cursor = ByteCursor(file, size, name)
            _check_version(cursor, name)
            num_tensors, num_values = cursor.number("Q", "its counts"), cursor.number("Q", "its counts")
            # At least 12 and 32 bytes each: neither number can keep us busy beyond what the file holds.
            if 12 * num_values + 32 * num_tensors > size or num_tensors > _MAX_TENSORS:
                raise CheckpointError(
                    f"{name} is truncated or lies about its sizes: {num_values} metadata values and {num_tensors} "
                    f"tensors do not fit into its {size} bytes; download it again"
                )
            metadata = Metadata.read(cursor, num_values, name)
            alignment = metadata.integer(_ALIGNMENT, _DEFAULT_ALIGNMENT)
            if alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
                raise metadata.wrong(_ALIGNMENT, f"{alignment} is no power of two")
            infos = [_read_info(cursor, name, alignment) for _ in range(num_tensors)]
            tensors = _place(path, infos, -(-cursor.position // alignment) * alignment, alignment, size)
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}") from error
    return GgufFile(path, metadata, tensors)


def _check_version(cursor: ByteCursor, name: str) -> None:
    magic = cursor.take(4, "its first word")
    if magic == b"vers":
        raise CheckpointError(f"{name} is a Git LFS pointer, not the weights: run git lfs pull")
    if magic != _MAGIC:
        raise CheckpointError(f"{name} is no GGUF file: it begins with {magic!r}")
    version: int = cursor.number("I", "its version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{name} is a big-endian GGUF file, which is not supported; convert the model again")
        raise CheckpointError(f"{name} is of GGUF version {version}; supported are {', '.join(map(str, _VERSIONS))}")


@dataclass(frozen=True, slots=True)
class _Info:
    """What the file says of a tensor; `offset` is from where the tensors begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset: int


def _read_info(cursor: ByteCursor, file_name: str, alignment: int) -> _Info:
    name = cursor.string("a tensor's name")
    what = f"tensor {shown(name)}"
    num_dimensions: int = cursor.number("I", what)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{file_name}: {what} has {num_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
    dimensions: list[int] = [cursor.number("Q", what) for _ in range(num_dimensions)]
    type_id: int = cursor.number("I", what)
    offset: int = cursor.number("Q", what)
    try:
        block = BlockType.of_id(type_id)
    except KeyError as error:
        raise CheckpointError(f"{file_name}: {what} is of unknown type {type_id}; is the file newer?") from error
    if min(dimensions) < 1 or math.prod(dimensions) >= 2**60 or dimensions[0] % block.num_values:
        raise CheckpointError(
            f"{file_name}: {what} of type {block.name} cannot be of shape {dimensions[::-1]}: rows are made of blocks "
            f"of {block.num_values} values"
        )
    if offset % alignment:
        raise CheckpointError(f"{file_name}: {what} begins at byte {offset}, which is no multiple of {alignment}")
    num_bytes = math.prod(dimensions) // block.num_values * block.num_bytes
    return _Info(name, block.name, tuple(reversed(dimensions)), num_bytes, offset)


def _place(path: Path, infos: list[_Info], start: int, alignment: int, size: int) -> dict[str, TensorEntry]:
    """Returns where the tensors are, having checked that they lie one after the other and inside the file."""
    tensors: dict[str, TensorEntry] = {}
    expected = 0
    for info in infos:
        what = f"tensor {shown(info.name)}"
        if info.name in tensors:
            raise CheckpointError(f"{path.name}: {what} occurs twice; download it again")
        if info.offset != expected:
            raise CheckpointError(
                f"{path.name}: {what} begins at byte {info.offset} of the tensors instead of {expected}, where the one "
                "before it ends; download it again"
            )
        begin = start + info.offset
        if begin + info.num_bytes > size:
            raise CheckpointError(
                f"{path.name} is truncated: {what} needs bytes {begin} to {begin + info.num_bytes}, the file has "
                f"{size}; download it again"
            )
        tensors[info.name] = TensorEntry(path, info.name, info.dtype, info.shape, begin, begin + info.num_bytes)
        expected = -(-(info.offset + info.num_bytes) // alignment) * alignment
    return tensors
