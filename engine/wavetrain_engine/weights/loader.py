# SPDX-License-Identifier: Apache-2.0
"""Streams a checkpoint into a model: complete, or an error and a model nobody may use.

Order matters: every name, shape and dtype is compared before any memory is asked for, so that neither a
config.json nor a header can make us allocate more than the files really hold. Then each tensor is read once, into its
place (its rows of a merged projection), converted on the way: module by module, as one that kernels want packed is
packed when its last tensor is there. So there is never more in memory than the weights and one module. Quantized
weights stay as they are, but for embeddings, whose kernels want numbers, and for experts of one projection that are
quantized in different ways.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.layers.linear import Linear
from wavetrain_engine.layers.moe import ExpertProjection, ExpertStack
from wavetrain_engine.layers.parameter import PackedModule
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.checkpoint import Checkpoint, first_few
from wavetrain_engine.weights.expert_stacks import unstack_experts
from wavetrain_engine.weights.name_map import EMBEDDING, OUTPUT_HEAD, Target, name_map
from wavetrain_engine.weights.stored_weight import Int8InputsWeight, StoredTensor, StoredWeight
from wavetrain_engine.weights.tensor_reader import Scratch, TensorReader
from wavetrain_engine.weights.weight_plan import describe_plan, plan_weights
from wavetrain_kernels.errors import DtypeError
from wavetrain_kernels.ops import QuantizedWeight

_LOG = logging.getLogger(__name__)

# Called with (bytes read, bytes to read) after each tensor.
Progress = Callable[[int, int], None]


def load_weights(
    model: Model,
    model_dir: Path,
    config: ModelConfig,
    *,
    has_int8_inputs: bool = False,
    progress: Progress | None = None,
) -> int:
    """Allocates `model` and fills it from the weight files of `model_dir`.

    Args:
        has_int8_inputs: weights that are stored in integers, and say nothing of their inputs, round those to int8.

    Returns:
        Bytes of memory that the weights take.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, misshapen, unknown or of a wrong dtype, or its numbers
            make no sense; or there is not enough memory.
    """
    tensors = unstack_experts(Checkpoint.open(model_dir).tensors, model)
    targets = name_map(model)
    weights = plan_weights(tensors, targets, config)
    reader = TensorReader(model.device)
    _check_tie(reader, tensors, weights)
    if has_int8_inputs:
        weights = {name: Int8InputsWeight(weight) for name, weight in weights.items()}
    scheme = describe_plan(weights, config)
    if scheme is not None:
        rounded = "; inputs of integers are rounded to int8" if has_int8_inputs else ""
        _LOG.info("quantized weights: %s%s", scheme, rounded)
    count = _Count(sum(weight.num_bytes for weight in weights.values()), progress)
    loading = _Loading(targets, weights, reader, Scratch(model.device), count)
    with memory_needed(_expected_bytes(targets, weights), model.max_model_len):
        model.allocate()
        weight_bytes = sum(loading.fill(module, names) for module, names in _by_module(targets, weights).items())
    loading.log_separate()
    return weight_bytes


class _Count:
    """Bytes read, as they are reported."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Loading:
    """Fills one module after the other."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        weights: Mapping[str, StoredWeight],
        reader: TensorReader,
        scratch: Scratch,
        count: _Count,
    ) -> None:
        self._targets = targets
        self._weights = weights
        self._reader = reader
        self._scratch = scratch
        self._count = count
        self._mixed = _mixed_stacks(targets, weights)
        self._num_separate = 0
        self._num_widened = 0
        self._widened_stacks: set[ExpertStack] = set()

    def fill(self, module: nn.Module, names: list[str]) -> int:
        """Reads what a module wants; returns the bytes of memory it takes."""
        is_quantized = any(self._weights[name].scheme is not None for name in names)
        if is_quantized:
            if _is_held_quantized(module, self._mixed):
                return self._fill_quantized(module, names)
            if isinstance(module, ExpertProjection):
                self._widened_stacks.add(module.stack)
            else:
                self._num_widened += 1
        num_bytes = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        with filling(module, self._scratch):
            for name in names:
                self._weights[name].read(self._reader, self._targets[name].memory())
                self._count.add(self._weights[name].num_bytes)
        return num_bytes

    def log_separate(self) -> None:
        """Says which modules are not held as one would think."""
        if self._num_separate:
            _LOG.warning(
                "%d merged projections have parts of different schemes, which are computed one by one",
                self._num_separate,
            )
        if self._num_widened:
            _LOG.warning("%d quantized embeddings are held unquantized", self._num_widened)
        if self._widened_stacks:
            _LOG.warning(
                "the experts of %d projections are held unquantized: they are quantized in different ways, or in one "
                "that kernels have no form for",
                len(self._widened_stacks),
            )

    def _fill_quantized(self, module: Linear | ExpertProjection, names: list[str]) -> int:
        parts: list[tuple[int, Tensor | QuantizedWeight]] = []
        num_bytes = 0
        for name in names:
            target, stored = self._targets[name], self._weights[name]
            if target.attribute == "weight":
                parts.append((target.start, self._read_part(stored, target, module)))
            else:
                stored.read(self._reader, target.memory())
                num_bytes += target.memory().nbytes
            self._count.add(stored.num_bytes)
        parts.sort(key=lambda part: part[0])
        try:
            num_bytes += module.pack_parts([part for _, part in parts])
        except DtypeError as error:
            raise CheckpointError(
                f"{first_few(names)}: not quantized as the first expert of this projection is: {error}"
            ) from error
        if isinstance(module, Linear):
            self._num_separate += module.is_separate
        elif module.stack.packed.scheme is None:
            self._widened_stacks.add(module.stack)
        return num_bytes

    def _read_part(
        self, stored: StoredWeight, target: Target, module: Linear | ExpertProjection
    ) -> Tensor | QuantizedWeight:
        weight = stored.read_quantized(self._reader)
        if weight is not None:
            return weight
        dense = torch.empty(target.shape, dtype=module.weight.dtype, device=self._reader.device)
        stored.read(self._reader, dense)
        return dense


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


def _expected_bytes(targets: Mapping[str, Target], weights: Mapping[str, StoredWeight]) -> int:
    """Returns what the weights take, quantized ones as many bytes as in the files."""
    mixed = _mixed_stacks(targets, weights)
    return sum(
        weights[name].num_bytes
        if weights[name].scheme is not None and _is_held_quantized(target.module, mixed)
        else math.prod(target.shape) * getattr(target.module, target.attribute).dtype.itemsize
        for name, target in targets.items()
    )


def _mixed_stacks(targets: Mapping[str, Target], weights: Mapping[str, StoredWeight]) -> set[ExpertStack]:
    """Returns the projections of experts that are not all stored in one format."""
    schemes: dict[ExpertStack, set[str | None]] = {}
    for name, target in targets.items():
        if isinstance(target.module, ExpertProjection):
            schemes.setdefault(target.module.stack, set()).add(weights[name].scheme)
    return {stack for stack, found in schemes.items() if len(found) > 1}


def _is_held_quantized(module: nn.Module, mixed: set[ExpertStack]) -> TypeGuard[Linear | ExpertProjection]:
    return isinstance(module, Linear) or (isinstance(module, ExpertProjection) and module.stack not in mixed)


def _by_module(targets: Mapping[str, Target], weights: Mapping[str, StoredWeight]) -> dict[nn.Module, list[str]]:
    """Returns the names of each module's weights, in the order they lie on disk: nearly one sequential read."""
    groups: dict[nn.Module, list[str]] = {}
    for name in sorted(targets, key=lambda name: weights[name].position):
        groups.setdefault(targets[name].module, []).append(name)
    return groups


def _check_tie(reader: TensorReader, tensors: Mapping[str, TensorEntry], weights: Mapping[str, StoredWeight]) -> None:
    """Refuses a checkpoint whose config.json ties two tensors that are both there and differ."""
    if OUTPUT_HEAD in weights or OUTPUT_HEAD not in tensors:
        return
    head = torch.empty(tensors[OUTPUT_HEAD].shape, dtype=torch.float32)
    reader.read(tensors[OUTPUT_HEAD], head)
    embedding = weights[EMBEDDING]
    is_equal = isinstance(embedding, StoredTensor) and embedding.entry.shape == tensors[OUTPUT_HEAD].shape
    if is_equal:
        other = torch.empty_like(head)
        embedding.read(reader, other)
        is_equal = torch.equal(head, other)
    if not is_equal:
        raise CheckpointError(
            f"config.json ties {OUTPUT_HEAD} to {EMBEDDING}, but the checkpoint has both and they differ; "
            "set tie_word_embeddings to false in config.json"
        )
