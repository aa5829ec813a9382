# SPDX-License-Identifier: Apache-2.0
"""Puts a checkpoint together from tensors that lie in other files, copying bytes: no tensor need fit into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.checkpoint import INDEX_FILE, SINGLE_FILE

_PIECE_BYTES = 2**24
_ALIGNMENT = 8  # of the tensors in a file: what readers that map it want
# Tensors are ordered by the size of their numbers, largest first, as the library does: so all are aligned.
_NUMBER_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def write_checkpoint(
    directory: Path, tensors: Mapping[str, TensorEntry], max_shard_bytes: int, progress: Callable[[int, int], None]
) -> None:
    """Writes model.safetensors, or shards and their index, into `directory`.

    Args:
        tensors: by the names they are to have, in the order in which shards are filled.
        progress: called with bytes written and bytes to write.

    Raises:
        CheckpointError: a file cannot be read.
        OSError: one cannot be written.
    """
    total = sum(entry.num_bytes for entry in tensors.values())
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, tensors, shards[0], count)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file_name, tensors, names, count)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, TensorEntry], max_shard_bytes: int) -> list[list[str]]:
    """Returns the names of each file's tensors; one that is larger than a file may be has a file of its own."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, entry in tensors.items():
        if entry.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= entry.num_bytes
    return shards


def _write_file(
    path: Path, tensors: Mapping[str, TensorEntry], names: Sequence[str], count: Callable[[int], None]
) -> None:
    ordered = sorted(names, key=lambda name: (-_NUMBER_BYTES.get(tensors[name].dtype, 1), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in ordered:
        entry = tensors[name]
        offsets = [position, position + entry.num_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            _copy(tensors[name], file)
            count(tensors[name].num_bytes)
        file.flush()
        os.fsync(file.fileno())


def _copy(entry: TensorEntry, target: BinaryIO) -> None:
    left = entry.num_bytes
    try:
        source = entry.file.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.file.name}: {error.strerror}") from error
    with source:
        source.seek(entry.begin)
        while left:
            piece = source.read(min(left, _PIECE_BYTES))
            if not piece:
                raise CheckpointError(f"{entry.file.name} became shorter while it was read; start again")
            target.write(piece)
            left -= len(piece)
