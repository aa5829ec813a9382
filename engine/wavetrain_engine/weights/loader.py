# SPDX-License-Identifier: Apache-2.0
"""Streams a checkpoint into a model: complete, or an error and a model nobody may use.

Order matters: every name, shape and dtype is compared before any memory is asked for, so that neither a
config.json nor a header can make us allocate more than the files really hold. Then each tensor is read once, into its
place (its rows of a merged projection), converted on the way: module by module, as one that kernels want packed is
packed when its last tensor is there. So there is never more in memory than the weights and one module.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.parameter import PackedModule
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.weights.checkpoint import Checkpoint
from wavetrain_engine.weights.expert_stacks import unstack_experts
from wavetrain_engine.weights.name_map import EMBEDDING, OUTPUT_HEAD, Target, check_tensors, name_map
from wavetrain_engine.weights.safetensors_header import TensorEntry
from wavetrain_engine.weights.tensor_reader import Scratch, TensorReader

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
    checkpoint = Checkpoint(unstack_experts(Checkpoint.open(model_dir).tensors, model))
    targets = name_map(model)
    check_tensors(checkpoint.tensors, targets, architecture=config.architecture, tied=config.tie_word_embeddings)
    reader = TensorReader(model.device)
    _check_tie(reader, checkpoint.tensors, targets)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    total_bytes, done_bytes = sum(checkpoint.tensors[name].num_bytes for name in targets), 0
    scratch = Scratch(model.device)
    with memory_needed(weight_bytes, model.max_model_len):
        model.allocate()
        for module, names in _by_module(targets, checkpoint.tensors).items():
            with filling(module, scratch):
                for name in names:
                    entry = checkpoint.tensors[name]
                    reader.read(entry, targets[name].memory())
                    done_bytes += entry.num_bytes
                    if progress is not None:
                        progress(done_bytes, total_bytes)
    return weight_bytes


@contextmanager
def filling(module: nn.Module, scratch: Scratch) -> Generator[None]:
    """Lends a module that is packed the memory for what is filled in inside, and packs it afterwards."""
    if isinstance(module, PackedModule):
        memory = scratch.take(tuple(module.weight.shape), module.weight.dtype)
        module.weight = nn.Parameter(memory, requires_grad=False)
    yield
    if isinstance(module, PackedModule):
        scratch.let_go(module.pack())


@contextmanager
def memory_needed(weight_bytes: int, max_model_len: int) -> Generator[None]:
    """Says what a lack of memory inside is about."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"not enough memory for {weight_bytes / 2**30:.1f} GiB of weights and a rotary table of "
            f"{max_model_len} positions"
        ) from error


def _by_module(targets: Mapping[str, Target], tensors: Mapping[str, TensorEntry]) -> dict[nn.Module, list[str]]:
    """Returns the names of each module's tensors, in the order they lie on disk: nearly one sequential read."""
    groups: dict[nn.Module, list[str]] = {}
    for name in sorted(targets, key=lambda name: (tensors[name].file, tensors[name].begin)):
        groups.setdefault(targets[name].module, []).append(name)
    return groups


def _check_tie(reader: TensorReader, tensors: Mapping[str, TensorEntry], targets: Mapping[str, Target]) -> None:
    """Refuses a checkpoint whose config.json ties two tensors that are both there and differ."""
    if OUTPUT_HEAD in targets or OUTPUT_HEAD not in tensors:
        return
    head, embedding = tensors[OUTPUT_HEAD], tensors[EMBEDDING]
    if head.shape != embedding.shape or not torch.equal(_read(reader, head), _read(reader, embedding)):
        raise CheckpointError(
            f"config.json ties {OUTPUT_HEAD} to {EMBEDDING}, but the checkpoint has both and they differ; "
            "set tie_word_embeddings to false in config.json"
        )


def _read(reader: TensorReader, entry: TensorEntry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=torch.float32)
    reader.read(entry, tensor)
    return tensor
