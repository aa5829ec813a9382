# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is to be quantized, as files: what it is, whether it may be, and what is copied from it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.weights.checkpoint import INDEX_FILE

_CONFIG = "config.json"
_QUANTIZED_KEYS = ("quantization_config", "compression_config")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
# Its model card's numbers are not those of the result.
_NOT_COPIED = frozenset({_CONFIG, INDEX_FILE, "README.md"})


@dataclass(frozen=True, slots=True)
class Original:
    """A checkpoint folder.

    Attributes:
        values: of its config.json.
    """

    model_dir: Path
    values: dict[str, Any]
    config: ModelConfig

    @classmethod
    def open(cls, model_dir: Path) -> Original:
        """Reads config.json.

        Raises:
            CheckpointError: there is none, or it is that of a quantized checkpoint.
            ConfigError, UnsupportedModelError: as ModelConfig.load.
        """
        if ModelLocation.find(model_dir).gguf is not None or not (model_dir / _CONFIG).is_file():
            raise CheckpointError(
                f"{model_dir.name[:80]!r}: a Hugging Face folder with config.json and unquantized safetensors is "
                "needed (GGUF files are served as they are)"
            )
        try:
            values: Any = json.loads((model_dir / _CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            values = None  # what is wrong with it is told below
        for key in _QUANTIZED_KEYS if isinstance(values, dict) else ():
            if values.get(key) is not None:
                method = values[key].get("quant_method", "") if isinstance(values[key], dict) else ""
                raise CheckpointError(
                    f"{model_dir.name[:80]!r} is quantized already ({str(method)[:40] or key}); give the unquantized "
                    "checkpoint that it was made from"
                )
        return cls(model_dir, values, ModelConfig.load(model_dir))

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells it from others, and from itself before a change, without reading its weights."""
        digest = hashlib.sha256()
        for path in (self.model_dir / _CONFIG, self.model_dir / "tokenizer.json"):
            digest.update(path.read_bytes() if path.is_file() else b"none")
        files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in _weight_files(self.model_dir)}
        return {"files": files, "config_and_tokenizer": digest.hexdigest()}

    def copy_other_files(self, target: Path) -> None:
        """Copies what is neither weights nor made anew: tokenizer, templates, generation_config.json, licences."""
        for path in sorted(self.model_dir.iterdir()):
            is_other = path.suffix not in _WEIGHT_SUFFIXES and path.name not in _NOT_COPIED
            if is_other and path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)


def weight_bytes(model_dir: Path) -> int:
    """Returns the bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in _weight_files(model_dir))


def _weight_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))
