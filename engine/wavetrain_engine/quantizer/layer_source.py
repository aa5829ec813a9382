# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is quantized: its tensors, read a layer at a time, and modules made of them that compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.parameter import allocate_parameters
from wavetrain_engine.layers.rotary import RotaryEmbedding
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model, resolve_dtype
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.checkpoint import Checkpoint
from wavetrain_engine.weights.expert_stacks import unstack_experts
from wavetrain_engine.weights.loader import filling
from wavetrain_engine.weights.name_map import Target, check_tensors, name_map
from wavetrain_engine.weights.tensor_reader import Scratch, TensorReader

_CPU = torch.device("cpu")
_LAYERS = "model.layers."


class LayerSource:
    """An unquantized checkpoint, complete and checked.

    Attributes:
        config: of the model.
        dtype: of the checkpoint, and of what its modules compute in.
        rest: the tensors outside of the layers, by name.

    Raises:
        CheckpointError: as `load_weights`, of what can be told before weights are read.
    """

    def __init__(self, model_dir: Path, config: ModelConfig, max_model_len: int) -> None:
        self.config = config
        self.dtype = resolve_dtype(config)
        self._shapes = create_model(config, self.dtype, _CPU, max_model_len=max_model_len)
        self._tensors = unstack_experts(Checkpoint.open(model_dir).tensors, self._shapes)
        targets = name_map(self._shapes)
        check_tensors(self._tensors, targets, architecture=config.architecture, tied=config.tie_word_embeddings)
        self.rest = {name: self._tensors[name] for name in targets if not name.startswith(_LAYERS)}
        self._names = [name for name in targets if name.startswith(_LAYERS)]
        self._reader = TensorReader()
        self._rotary = next(module for module in self._shapes.modules() if isinstance(module, RotaryEmbedding))
        self._rotary.allocate(_CPU)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.num_layers

    def shape(self, index: int) -> nn.Module:
        """Returns a layer without memory."""
        return self._layers[index]

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Returns a layer's tensors in float32, by their names relative to the layer.

        Raises:
            CheckpointError: a file cannot be read.
        """
        prefix = layer_prefix(index)
        return {
            name.removeprefix(prefix): self._read(self._tensors[name], torch.float32)
            for name in self._names
            if name.startswith(prefix)
        }

    def build_layer(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Returns a layer that computes with these tensors, rounded to the checkpoint's dtype."""
        layer = copy.deepcopy(self._layers[index], {id(self._rotary): self._rotary})
        allocate_parameters(layer, _CPU)
        _fill(layer, {f"model.{name}": tensor for name, tensor in tensors.items()})
        return layer

    def stage(self, layer: nn.Module) -> Model:
        """Returns a model of a layer alone: its input are hidden states and not token ids, its output is the next's."""
        model = copy.copy(self._shapes)
        # A module's children live in this dictionary, which a shallow copy shares.
        model.__dict__["_modules"] = dict(self._shapes.__dict__["_modules"])
        model.embed_tokens = nn.Identity()  # type: ignore[assignment]  # called with the hidden states, and no more
        model.layers = nn.ModuleList([layer])
        model.norm = _Sum()
        return model

    def ends(self) -> Model:
        """Returns a model without layers: embeddings, last norm and output head."""
        config = self.config
        model = create_model(config, self.dtype, _CPU, max_model_len=1)
        model.layers = nn.ModuleList()
        allocate_parameters(model, _CPU)
        _fill(model, {name: self._read(entry, self.dtype) for name, entry in self.rest.items()})
        return model

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self._shapes.layers
        assert isinstance(layers, nn.ModuleList), "every family has layers"
        return layers

    def _read(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=dtype)
        self._reader.read(entry, tensor)
        return tensor


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors start with in a checkpoint."""
    return f"{_LAYERS}{index}."


class _Sum(nn.Module):
    """In the place of the last norm: adds what comes to the residual, and leaves it at that."""

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return total, total


def _fill(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills and packs the modules of `root`, as the loader does."""
    by_module: dict[nn.Module, dict[str, Target]] = {}
    for name, target in name_map(root).items():
        by_module.setdefault(target.module, {})[name] = target
    for module, targets in by_module.items():
        with filling(module, Scratch(_CPU)):  # what is packed in place keeps this memory
            for name, target in targets.items():
                target.memory().copy_(tensors[name])
