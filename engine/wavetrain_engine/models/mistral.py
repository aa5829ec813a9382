# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B (Jiang et al. 2023): Llama whose every layer sees a sliding window of the context."""

from __future__ import annotations

from wavetrain_engine.models.llama import Llama


class Mistral(Llama):
    """Llama; the windows are in `ModelConfig.sliding_windows`."""
