# SPDX-License-Identifier: Apache-2.0
"""The rotary part of config.json, in the form of transformers 5 and in the older one.

    transformers 5:  "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}
    before:          "rope_theta": 500000.0, "rope_scaling": {"type" or "rope_type": "llama3", "factor": 8.0, ...}

Where a file has both, `rope_scaling` wins and a theta inside the object wins, as in transformers.
"""

from __future__ import annotations

import difflib
from typing import cast

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import ConfigError, UnsupportedModelError
from wavetrain_engine.layers.rope_config import ROPE_TYPES, RopeConfig, RopeType

_MAX_THETA = 1e12
_MAX_FACTOR = 1e5


def parse_rope(
    config: ConfigReader, max_position_embeddings: int, position_limit: int, *, default_theta: float = 10000.0
) -> RopeConfig:
    """Returns the rotary configuration of a model.

    Args:
        position_limit: the highest accepted original_max_position_embeddings.
        default_theta: where none is given.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: a type of scaling, or a partial rotation, that is not served.
    """
    name = "rope_scaling" if config.mapping("rope_scaling") else "rope_parameters"
    values = config.mapping(name)
    rope = ConfigReader(values, f"config.json: {name}")
    rope_type = _rope_type(rope)
    for reader in (rope, config):
        if reader.number("partial_rotary_factor", 1.0, low=0, high=1) != 1:
            raise UnsupportedModelError("config.json: partial_rotary_factor below 1 is not supported yet")

    theta = rope.optional_number("rope_theta", low=1, high=_MAX_THETA)
    if theta is None:
        theta = config.number("rope_theta", default_theta, low=1, high=_MAX_THETA)
    if rope_type == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=max_position_embeddings)

    original = max_position_embeddings
    if rope_type in ("llama3", "yarn"):
        # A value beside the object wins over the one inside it, as in transformers.
        reader = config if config.value("original_max_position_embeddings") is not None else rope
        original = reader.integer("original_max_position_embeddings", original, high=position_limit)
    low_freq_factor = rope.number("low_freq_factor", 1.0 if rope_type != "llama3" else None, low=0, high=_MAX_FACTOR)
    high_freq_factor = rope.number("high_freq_factor", 4.0 if rope_type != "llama3" else None, low=0, high=_MAX_FACTOR)
    if rope_type == "llama3" and high_freq_factor <= low_freq_factor:
        raise ConfigError("config.json: high_freq_factor must be above low_freq_factor")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=_factor(rope, rope_type, max_position_embeddings / original),
        original_max_position_embeddings=original,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        beta_fast=rope.number("beta_fast", 32.0, low=0, high=_MAX_FACTOR),
        beta_slow=rope.number("beta_slow", 1.0, low=0, high=_MAX_FACTOR),
        mscale=rope.optional_number("mscale", low=-1e-9, high=_MAX_FACTOR),
        mscale_all_dim=rope.optional_number("mscale_all_dim", low=-1e-9, high=_MAX_FACTOR),
        attention_factor=rope.optional_number("attention_factor", high=_MAX_FACTOR),
        truncate=rope.boolean("truncate", True),
    )


def _rope_type(rope: ConfigReader) -> RopeType:
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        nearest = difflib.get_close_matches(rope_type, ROPE_TYPES, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UnsupportedModelError(
            f"config.json: rope type {rope_type!r} is not supported yet; supported are {', '.join(ROPE_TYPES)}{hint}"
        )
    return cast("RopeType", rope_type)


def _factor(rope: ConfigReader, rope_type: RopeType, implied: float) -> float:
    """Returns the scaling factor; only yarn can do without one, by the ratio of the two context lengths."""
    factor = rope.number("factor", implied if rope_type == "yarn" else None, low=0, high=_MAX_FACTOR)
    if factor < 1:
        raise ConfigError(f"config.json: the rope scaling factor must be at least 1, got {factor:g}")
    return factor
