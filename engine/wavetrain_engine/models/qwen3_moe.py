# SPDX-License-Identifier: Apache-2.0
"""Qwen3's mixtures of experts (Yang et al. 2025): Qwen3 with such a block in most layers, or in all."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from wavetrain_engine.models.mixtral import mixture_of
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.qwen3 import Qwen3, Qwen3Layer


class Qwen3MoeLayer(Qwen3Layer):
    """Qwen3's layer; `ModelConfig.moe` says whether this one is a mixture."""

    def feed_forward(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> nn.Module:
        assert config.moe is not None, "the family has mixtures of experts"
        return mixture_of(config, dtype) if config.moe.layers[layer] else super().feed_forward(config, layer, dtype)


class Qwen3Moe(Qwen3):
    """The whole decoder."""

    layer_class: ClassVar[type[nn.Module]] = Qwen3MoeLayer
