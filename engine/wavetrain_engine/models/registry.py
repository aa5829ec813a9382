# SPDX-License-Identifier: Apache-2.0
"""From a ModelConfig to a model."""

from __future__ import annotations

import torch

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.models.gemma2 import Gemma2
from wavetrain_engine.models.llama import Llama
from wavetrain_engine.models.mistral import Mistral
from wavetrain_engine.models.mixtral import Mixtral
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.qwen2 import Qwen2
from wavetrain_engine.models.qwen3 import Qwen3
from wavetrain_engine.models.qwen3_moe import Qwen3Moe

# Keyed by what config.json calls the architecture; a test keeps it equal to model_config.ARCHITECTURES.
MODEL_CLASSES: dict[str, type[Model]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "MixtralForCausalLM": Mixtral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Gemma2ForCausalLM": Gemma2,
}

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(config: ModelConfig, requested: str = "auto") -> torch.dtype:
    """Returns the dtype of weights and activations; "auto" is the checkpoint's own."""
    return _DTYPES[config.dtype if requested == "auto" else requested]


def create_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, *, max_model_len: int | None = None
) -> Model:
    """Returns the model of `config`: shapes only, no memory; `load_weights` allocates it on `device` and fills it.

    Args:
        max_model_len: positions the rotary table holds; None: `config.max_model_len`.

    Raises:
        ConfigError: max_model_len is longer than the model's positions reach.
    """
    length = config.max_model_len if max_model_len is None else max_model_len
    if length > config.max_model_len_limit:
        raise ConfigError(
            f"max_model_len {length} is longer than the {config.max_model_len_limit} tokens this model's "
            "positions reach; lower --max-model-len"
        )
    return MODEL_CLASSES[config.architecture](config, dtype, torch.device(device), length)
