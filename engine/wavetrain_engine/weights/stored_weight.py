# SPDX-License-Identifier: Apache-2.0
"""One weight, norm or bias of a model as its checkpoint holds it: checked, found, not yet read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from wavetrain_engine.quantization.decode import decode
from wavetrain_engine.quantization.int8_inputs import with_int8_inputs
from wavetrain_engine.quantization.layer_tensors import LayerTensors
from wavetrain_engine.quantization.stored_format import StoredFormat
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.gguf_reader import read_quantized
from wavetrain_engine.weights.gguf_tensors import GgufTensor
from wavetrain_engine.weights.tensor_reader import TensorReader
from wavetrain_kernels.ops import QuantizedWeight, dequantize


class StoredWeight(Protocol):
    """What the loader needs to know of it."""

    @property
    def num_bytes(self) -> int:
        """To read."""
        ...

    @property
    def position(self) -> tuple[Path, int]:
        """Where it begins, for reading in the order of the disk."""
        ...

    @property
    def scheme(self) -> str | None:
        """How it is quantized, for the log; None: it is not."""
        ...

    def read(self, reader: TensorReader, out: Tensor) -> None:
        """Fills `out` with its numbers, dequantized, converted to the dtype of `out`.

        Raises:
            CheckpointError: a file cannot be read, or its numbers make no sense.
        """
        ...

    def read_quantized(self, reader: TensorReader) -> QuantizedWeight | None:
        """Returns it as it is quantized; None: it is not, or in a way that kernels have no form for.

        Raises:
            CheckpointError: as `read`.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A weight in one tensor, which says itself what it is."""

    entry: TensorEntry

    @property
    def num_bytes(self) -> int:
        """To read."""
        return self.entry.num_bytes

    @property
    def position(self) -> tuple[Path, int]:
        """Where it begins."""
        return self.entry.file, self.entry.begin

    @property
    def scheme(self) -> str | None:
        """The type of a GGUF file's blocks."""
        return self.entry.dtype if isinstance(self.entry, GgufTensor) and self.entry.is_quantized else None

    def read(self, reader: TensorReader, out: Tensor) -> None:
        """Fills `out`."""
        reader.read(self.entry, out)

    def read_quantized(self, reader: TensorReader) -> QuantizedWeight | None:
        """Returns the blocks of a GGUF file as they are, where they have a form."""
        weight = read_quantized(self.entry) if isinstance(self.entry, GgufTensor) else None
        return None if weight is None else _on_device(weight, reader.device)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A weight in several tensors, in a format that config.json names.

    Attributes:
        layer: its name in the checkpoint.
        entries: its tensors, by what follows that name.
        shape: of the weight [N, K].
    """

    layer: str
    format: StoredFormat
    entries: Mapping[str, TensorEntry]
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """To read, of all its tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def position(self) -> tuple[Path, int]:
        """Where the first of them begins."""
        return min((entry.file, entry.begin) for entry in self.entries.values())

    @property
    def scheme(self) -> str | None:
        """That of the format."""
        return self.format.describe()

    def read(self, reader: TensorReader, out: Tensor) -> None:
        """Fills `out`."""
        out.copy_(dequantize(self.read_quantized(reader)))

    def read_quantized(self, reader: TensorReader) -> QuantizedWeight:
        """Returns the weight."""
        tensors = {name: reader.read_new(entry) for name, entry in self.entries.items()}
        return decode(self.format, LayerTensors(self.layer, tensors), *self.shape)


@dataclass(frozen=True, slots=True)
class Int8InputsWeight:
    """A weight whose inputs are rounded to int8, if it is stored in integers and says nothing of them."""

    stored: StoredWeight

    @property
    def num_bytes(self) -> int:
        """To read."""
        return self.stored.num_bytes

    @property
    def position(self) -> tuple[Path, int]:
        """Where it begins."""
        return self.stored.position

    @property
    def scheme(self) -> str | None:
        """As it is stored."""
        return self.stored.scheme

    def read(self, reader: TensorReader, out: Tensor) -> None:
        """Fills `out`."""
        self.stored.read(reader, out)

    def read_quantized(self, reader: TensorReader) -> QuantizedWeight | None:
        """Returns the weight."""
        weight = self.stored.read_quantized(reader)
        return None if weight is None else with_int8_inputs(weight)


def _on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    tensors = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{name: item.to(device) for name, item in tensors.items() if isinstance(item, Tensor)})
