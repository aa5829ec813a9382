# SPDX-License-Identifier: Apache-2.0
"""Streams a checkpoint into a model: complete, or an error and a model nobody may use.

Order matters: every name, shape and dtype is compared before any memory is asked for, so that neither a
config.json nor a header can make us allocate more than the files really hold. Then each tensor is copied once,
from the mapped file into its place (its rows of a merged projection), converted on the way; a module that kernels want
packed is packed when its last tensor is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.parameter import PackedModule
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.weights.checkpoint import Checkpoint
from wavetrain_engine.weights.name_map import EMBEDDING, OUTPUT_HEAD, Target, check_tensors, name_map
from wavetrain_engine.weights.safetensors_header import TensorEntry

# Called with (bytes read, bytes to read) after each tensor.
Progress = Callable[[int, int], None]


def load_weights(model: Model, model_dir: Path, config: ModelConfig, *, progress: Progress | None = None) -> int:
    """Allocates `model` and fills it from the safetensors files of `model_dir`.

    Returns:
        Bytes of memory that the weights take.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, misshapen, unknown or of a wrong dtype; or
            there is not enough memory.
    """
    checkpoint = Checkpoint.open(model_dir)
    targets = name_map(model)
    check_tensors(checkpoint.tensors, targets, architecture=config.architecture, tied=config.tie_word_embeddings)
    _check_tie(checkpoint.tensors, targets)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    try:
        model.allocate()
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"not enough memory for {weight_bytes / 2**30:.1f} GiB of weights and a rotary table of "
            f"{model.max_model_len} positions"
        ) from error
    entries = [checkpoint.tensors[name] for name in targets]
    total_bytes, done_bytes = sum(entry.num_bytes for entry in entries), 0
    missing = Counter(target.module for target in targets.values())
    for entry, tensor in _stream(entries):
        target = targets[entry.name]
        target.memory().copy_(tensor)
        missing[target.module] -= 1
        if not missing[target.module] and isinstance(target.module, PackedModule):
            target.module.pack()
        done_bytes += entry.num_bytes
        if progress is not None:
            progress(done_bytes, total_bytes)
    return weight_bytes


def _stream(entries: Iterable[TensorEntry]) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Yields every tensor, mapped and not copied, in the order they lie on disk: one sequential read."""
    ordered = sorted(entries, key=lambda entry: (entry.file, entry.begin))
    for file, group in groupby(ordered, key=lambda entry: entry.file):
        yield from _read(file, group)


def _read(file: Path, entries: Iterable[TensorEntry]) -> Iterator[tuple[TensorEntry, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as reader:
            for entry in entries:
                yield entry, reader.get_tensor(entry.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file.name}: {error}") from error


def _check_tie(tensors: Mapping[str, TensorEntry], targets: Mapping[str, Target]) -> None:
    """Refuses a checkpoint whose config.json ties two tensors that are both there and differ."""
    if OUTPUT_HEAD in targets or OUTPUT_HEAD not in tensors:
        return
    head, embedding = tensors[OUTPUT_HEAD], tensors[EMBEDDING]
    values = dict(_stream((head, embedding))) if head.shape == embedding.shape else {}
    if not values or not torch.equal(values[head], values[embedding]):
        raise CheckpointError(
            f"config.json ties {OUTPUT_HEAD} to {EMBEDDING}, but the checkpoint has both and they differ; "
            "set tie_word_embeddings to false in config.json"
        )
