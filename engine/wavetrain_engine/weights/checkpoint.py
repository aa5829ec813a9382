# SPDX-License-Identifier: Apache-2.0
"""Which files make up a checkpoint, and which tensors they hold: found and checked before any weight is read.

Of a directory, only safetensors files are read. The files Hugging Face's own loaders look for are looked for, in their
order: model.safetensors, else the shards that model.safetensors.index.json names. Else a GGUF file. Never torch here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.gguf_tensors import gguf_tensors
from wavetrain_engine.weights.safetensors_header import read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 2**26
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint by name; every one lies whole in its file."""

    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, model_dir: Path) -> Checkpoint:
        """Finds the weight files of `model_dir`, or the GGUF file that it is, and reads their headers.

        Raises:
            CheckpointError: no weight files, only pickle files, a missing or truncated shard, an index that
                does not fit its shards or names a file outside the directory.
        """
        gguf = ModelLocation.find(model_dir).gguf
        if gguf is not None:
            return cls(dict(gguf_tensors(GgufFile.open(gguf))))
        if (model_dir / SINGLE_FILE).is_file():
            return cls({entry.name: entry for entry in read_header(model_dir / SINGLE_FILE)})
        if (model_dir / INDEX_FILE).is_file():
            return cls(_read_shards(model_dir, _read_index(model_dir / INDEX_FILE)))
        raise _no_weights(model_dir)


def first_few(names: list[str]) -> str:
    """Returns up to three names and how many more there are, for a message."""
    # Names come from strangers: no escape sequence of theirs may reach a terminal.
    safe = [name if name.isprintable() else ascii(name) for name in names[:3]]
    shown = ", ".join(name if len(name) <= 120 else f"{name[:117]}..." for name in safe)
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_index(path: Path) -> dict[str, str]:
    """Returns tensor name → file name."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path.name} is larger than {_MAX_INDEX_BYTES} bytes")
        index: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from error
    weight_map = cast("dict[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name} must hold an object weight_map, tensor name → file name")
    for file_name in cast("dict[str, Any]", weight_map).values():
        if not isinstance(file_name, str) or not _is_plain_file_name(file_name):
            raise CheckpointError(
                f"{path.name} names the file {str(file_name)[:80]!r}: only *.safetensors files beside it are read"
            )
    return cast("dict[str, str]", weight_map)


def _is_plain_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(part in name for part in ("/", "\\", "\0", ":"))


def _read_shards(model_dir: Path, weight_map: dict[str, str]) -> dict[str, TensorEntry]:
    file_names = sorted(set(weight_map.values()))
    missing = [name for name in file_names if not (model_dir / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(file_names)} weight files are missing: {first_few(missing)}; download them again"
        )
    tensors: dict[str, TensorEntry] = {}
    for file_name in file_names:
        for entry in read_header(model_dir / file_name):
            if entry.name in tensors:
                raise CheckpointError(
                    f"tensor {first_few([entry.name])} is in {tensors[entry.name].file.name} and in {file_name}"
                )
            tensors[entry.name] = entry
    lost = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if lost:
        raise CheckpointError(f"{INDEX_FILE} names tensors that are not in their files: {first_few(lost)}")
    return tensors


def _no_weights(model_dir: Path) -> CheckpointError:
    names = sorted(path.name for path in model_dir.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return CheckpointError(
            f"{model_dir.name!r} has {first_few(others)}, but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "a complete checkpoint has one of them"
        )
    if pickles:
        return CheckpointError(
            f"{model_dir.name!r} has weights as pickle files only ({first_few(pickles)}), which are never read: they "
            'can run code. Convert them where you trust them: python -c "from transformers import '
            "AutoModelForCausalLM as M; M.from_pretrained('IN').save_pretrained('OUT')\""
        )
    return CheckpointError(f"{model_dir.name!r} has no weights: {SINGLE_FILE} is missing")
