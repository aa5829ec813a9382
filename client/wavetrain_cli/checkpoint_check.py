# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint can be served, as far as that can be told in milliseconds and without torch.

The engine checks everything again, and more, when it loads. This only makes the common mistakes known before a server
is started.
"""

from __future__ import annotations

from pathlib import Path

from wavetrain_cli.errors import CommandError
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.vocabulary import check_tokenizer
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.weights.checkpoint import Checkpoint


def check_checkpoint(config: EngineConfig) -> None:
    """Reads config.json and the headers of the weight files, and looks for a tokenizer.

    Raises:
        CommandError: there is no tokenizer.
        CheckpointError, ConfigError: as ModelConfig.load and Checkpoint.open; or a GGUF file's tokenizer is not served.
    """
    model = Path(config.model.model)
    ModelConfig.load(model)
    Checkpoint.open(model)
    if config.model.skip_tokenizer_init:
        return
    gguf = ModelLocation.find(model).gguf
    if gguf is not None:
        check_tokenizer(GgufFile.open(gguf).metadata)
    elif not (model / "tokenizer.json").is_file():
        raise CommandError(f"{model} has no tokenizer.json; --skip-tokenizer-init serves token ids without one")
