# SPDX-License-Identifier: Apache-2.0
"""How positions are rotated into queries and keys: the values, without torch.

It lives beside the layer it configures; the parser of config.json (`models`) fills it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Base and scaling of rotary position embeddings; each value means what it means in config.json.

    Attributes:
        original_max_position_embeddings: positions the model was first trained for; `dynamic`, `llama3` and
            `yarn` stretch from there.
        frequency_factors: what each pair of dimensions turns slower by, after all else; empty: none does. GGUF files
            have Llama 3's scaling in this form.
        attention_factor: scales cos and sin; None: as the type computes it (only `yarn` has one).
    """

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 2048
    frequency_factors: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
