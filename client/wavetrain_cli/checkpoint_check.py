# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint can be served, as far as that can be told in milliseconds and without torch.

The engine checks everything again, and more, when it loads. This only makes the common mistakes known before a server
is started.
"""

from __future__ import annotations

from pathlib import Path

from wavetrain_cli.errors import CommandError
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.models.model_config import ModelConfig


def check_checkpoint(config: EngineConfig) -> None:
    """Reads config.json and looks for weights and tokenizer.

    Raises:
        CommandError: a file is missing.
        WavetrainError: config.json is not usable, or asks for a model that is not served.
    """
    model_dir = Path(config.model.model)
    ModelConfig.load(model_dir)
    if not any(model_dir.glob("*.safetensors")):
        pickles = sorted(
            item.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for item in model_dir.glob(pattern)
        )
        if pickles:
            raise CommandError(
                f"{model_dir} holds its weights as pickles ({pickles[0]}), which can run code and are never read; "
                "convert them to safetensors first"
            )
        raise CommandError(f"{model_dir} holds no *.safetensors file")
    if not config.model.skip_tokenizer_init and not (model_dir / "tokenizer.json").is_file():
        raise CommandError(f"{model_dir} has no tokenizer.json; --skip-tokenizer-init serves token ids without one")
