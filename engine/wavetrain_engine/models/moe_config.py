# SPDX-License-Identifier: Apache-2.0
"""The part of config.json that is about mixtures of experts. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import ConfigError

# Four times the most of the families that are served; each expert becomes a module and three tensors.
_MAX_EXPERTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Layers whose feed-forward block is a choice of several.

    Attributes:
        num_experts_per_tok: how many of them a token goes to.
        intermediate_size: units of one expert.
        is_renormalized: whether the weights of a token's experts are made to add up to 1.
        layers: per layer, whether it is a mixture; if not, it has a block like other families'.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    is_renormalized: bool
    layers: tuple[bool, ...]


def parse_moe(config: ConfigReader, model_type: str, num_layers: int) -> MoeConfig | None:
    """Returns the mixtures of a family, by its rules in transformers; None for a family without.

    Raises:
        ConfigError: a value is of the wrong type or out of range, or two do not fit.
    """
    if model_type == "mixtral":
        num_experts, per_token = _num_experts(config, 8), config.integer("num_experts_per_tok", 2, high=_MAX_EXPERTS)
        size, is_renormalized = config.integer("intermediate_size", high=2**20), True
        layers = (True,) * num_layers
    elif model_type == "qwen3_moe":
        num_experts, per_token = _num_experts(config, 128), config.integer("num_experts_per_tok", 8, high=_MAX_EXPERTS)
        size = config.integer("moe_intermediate_size", 768, high=2**20)
        is_renormalized = config.boolean("norm_topk_prob", False)
        step, dense = config.integer("decoder_sparse_step", 1, high=2**31), set(config.integers("mlp_only_layers"))
        layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    else:
        return None
    if per_token > num_experts:
        raise ConfigError(f"config.json: num_experts_per_tok ({per_token}) is more than the {num_experts} experts")
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        intermediate_size=size,
        is_renormalized=is_renormalized,
        layers=layers,
    )


def _num_experts(config: ConfigReader, default: int) -> int:
    """Returns their number. Both names are in use for both families; transformers takes each for the other."""
    names = ("num_local_experts", "num_experts")
    found = {config.integer(name, high=_MAX_EXPERTS) for name in names if config.value(name) is not None}
    if len(found) > 1:
        raise ConfigError("config.json: num_local_experts and num_experts are two names of one thing, but differ")
    return found.pop() if found else default
