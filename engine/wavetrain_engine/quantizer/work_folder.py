# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for the next one, should it be interrupted: finished layers, and what they were made from.

manifest.json               the inputs: recipe, checkpoint, text; another run's layers are never mixed in
layer-00007.safetensors     a finished layer's tensors, and layer-00007.json, what the report says of it
hidden-7.*                  what flows into layer 7: the first that is not finished
checkpoint/                 the result, until it is complete and moved to its place
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.tensor_entry import TensorEntry
from wavetrain_engine.weights.safetensors_header import read_header

_MANIFEST = "manifest.json"


class WorkFolder:
    """The folder of one result, beside its place.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, out: Path) -> WorkFolder:
        """The folder for a result that will be at `out`."""
        return cls(out.with_name(f".{out.name}.work"))

    def start(self, inputs: Mapping[str, Any], *, discards: bool) -> int:
        """Makes the folder ready, and returns how many layers are finished in it.

        Args:
            inputs: everything the result depends on.
            discards: what is there is removed first.

        Raises:
            ConfigError: it holds layers of other inputs.
            OSError: it cannot be written.
        """
        if discards:
            self.remove()
        self.path.mkdir(parents=True, exist_ok=True)
        manifest = self.path / _MANIFEST
        before = _read_json(manifest)
        wanted = json.loads(json.dumps(inputs))
        if before is None:
            # Without it nobody knows what the rest is made from.
            self.remove()
            self.path.mkdir(parents=True)
            write_json(manifest, wanted)
        elif before != wanted:
            changed = ", ".join(sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key)))
            raise ConfigError(
                f"{self.path.name} holds an unfinished run with other inputs ({changed}); finish it with the command "
                "it was started with, or add --restart to throw it away"
            )
        return self._num_finished()

    def save_layer(self, index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps a finished layer."""
        partial = self.path / f"{_stem(index)}.partial"
        save_file(dict(tensors), partial)
        partial.replace(self.path / f"{_stem(index)}.safetensors")
        write_json(self.path / f"{_stem(index)}.json", facts)  # what makes it finished

    def layer_tensors(self, index: int) -> list[TensorEntry]:
        """Returns where the tensors of a finished layer lie.

        Raises:
            CheckpointError: the file was damaged.
        """
        return read_header(self.path / f"{_stem(index)}.safetensors")

    def layer_facts(self, index: int) -> dict[str, Any]:
        """Returns what was kept of a finished layer."""
        facts = _read_json(self.path / f"{_stem(index)}.json")
        assert facts is not None, "only of layers that are finished"
        return facts

    def hidden(self, index: int, text: str) -> Path:
        """Where the hidden states that flow into a layer are kept, of one text."""
        return self.path / f"hidden-{index}.{text}"

    def forget_hidden(self, index: int) -> None:
        """Removes what flowed into a layer that is finished."""
        for path in self.path.glob(f"hidden-{index}.*"):
            path.unlink()

    def new_checkpoint(self) -> Path:
        """Returns an empty folder for the result."""
        folder = self.path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def remove(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _num_finished(self) -> int:
        index = 0
        while (self.path / f"{_stem(index)}.json").is_file():
            index += 1
        return index


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file in one move, so that nobody ever sees half of it."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _stem(index: int) -> str:
    return f"layer-{index:05d}"


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns what the file holds; None where there is none, or not a whole one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
