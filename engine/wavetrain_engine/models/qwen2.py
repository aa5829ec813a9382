# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with a bias on queries, keys and values."""

from __future__ import annotations

from wavetrain_engine.models.llama import Llama


class Qwen2(Llama):
    """Llama; the bias is in `ModelConfig.attention_bias`, windows of the upper layers in `sliding_windows`."""
