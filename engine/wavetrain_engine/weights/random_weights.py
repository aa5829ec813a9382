# SPDX-License-Identifier: Apache-2.0
"""Weights for measuring without a checkpoint: random, made where the model is, the same each time. Norms scale by one.

Random and not zero: a GPU multiplies zeros faster than anything else, as their bits do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.models.model import Model
from wavetrain_engine.weights.loader import Progress, filling, memory_needed
from wavetrain_engine.weights.tensor_reader import Scratch

# As transformers initializes most models: activations neither vanish nor overflow.
_STANDARD_DEVIATION = 0.02


def draw_weights(model: Model, *, seed: int = 0, progress: Progress | None = None) -> int:
    """Allocates `model` and fills it with numbers drawn on its device.

    Returns:
        Bytes of memory that the weights take.

    Raises:
        CheckpointError: there is not enough memory.
    """
    total_bytes, done_bytes = sum(parameter.nbytes for parameter in model.parameters()), 0
    generator = torch.Generator(model.device).manual_seed(seed)
    scratch = Scratch(model.device)
    with memory_needed(total_bytes, model.max_model_len):
        model.allocate()
        for module in model.modules():
            num_bytes = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
            if not num_bytes:
                continue
            with filling(module, scratch):
                for name, parameter in module.named_parameters(recurse=False):
                    _draw(parameter.data, name, generator, is_norm=isinstance(module, RMSNorm))
            done_bytes += num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return total_bytes


def _draw(parameter: Tensor, name: str, generator: torch.Generator, *, is_norm: bool) -> None:
    if is_norm:
        parameter.fill_(1.0)
    elif name == "bias":
        parameter.zero_()
    else:
        parameter.normal_(std=_STANDARD_DEVIATION, generator=generator)
