# SPDX-License-Identifier: Apache-2.0
"""What was named as model, found on disk: a checkpoint directory, or a GGUF file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from wavetrain_engine.errors import CheckpointError

_SUFFIX = ".gguf"
_LATER_PART = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")
# Any of these makes a directory a Hugging Face checkpoint; a GGUF file beside them is another form of the model.
_CHECKPOINT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        path: as it was named.
        gguf: the file that holds everything: named itself, or alone in the directory; None: a checkpoint directory.
    """

    path: Path
    gguf: Path | None

    @classmethod
    def find(cls, named: Path | str) -> ModelLocation:
        """Looks.

        Raises:
            CheckpointError: there is nothing of this name, or a file that is no GGUF file, or a directory with several
                GGUF files and nothing else to serve.
        """
        path = Path(named)
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name too long
            return cls(path, _only_gguf(path))
        if not os.path.isfile(path):
            raise CheckpointError(
                f"there is no checkpoint directory {path.name[:80]!r}; give a Hugging Face model folder with "
                "config.json, *.safetensors and tokenizer.json, or a GGUF file"
            )
        if path.suffix.lower() != _SUFFIX:
            raise CheckpointError(
                f"{path.name[:80]!r} is not a directory; give the folder that holds config.json and the safetensors "
                "files, or a GGUF file (*.gguf)"
            )
        return cls(path, path)


def _only_gguf(directory: Path) -> Path | None:
    if any((directory / name).is_file() for name in _CHECKPOINT_FILES):
        return None
    files = sorted(item for item in directory.iterdir() if item.suffix.lower() == _SUFFIX and item.is_file())
    files = [item for item in files if not _LATER_PART.fullmatch(item.name)]
    if len(files) > 1:
        names = ", ".join(item.name for item in files[:3])
        raise CheckpointError(
            f"{directory.name!r} has {len(files)} GGUF files ({names}); give the path of the one to serve"
        )
    return files[0] if files else None
