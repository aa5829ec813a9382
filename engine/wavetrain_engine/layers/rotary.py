# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: inverse frequencies of every type of scaling, and the table of cos and sin.

The arithmetic and its order are those of transformers (modeling_rope_utils.py), in float32, rounded to the
model's dtype at the end: token-for-token equality depends on it.

`dynamic` (NTK) scaling is the one place where we differ on purpose. transformers recomputes the base from
the current length whenever a request grows past max_position_embeddings, while the keys in its cache keep
the rotation they got under an older base; the result depends on how a prompt was cut into steps. Paged,
chunked and shared KV needs a key to be a function of token and position alone. So the base is chosen once, for
the longest request allowed (max_model_len): up to max_position_embeddings that is no scaling at all and equal
to transformers, beyond it is what transformers computes for a prompt of exactly max_model_len tokens. vLLM
also chooses once, but always for max_position_embeddings * factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.layers.norm import RMSNorm
from wavetrain_engine.layers.rope_config import RopeConfig
from wavetrain_kernels import ops

_ROWS_AT_ONCE = 2**15


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions, on their way into the cache. One per model, shared by its layers.

    The table [max_positions, 2, head_dim / 2] is made by `allocate`, not before: its size comes from
    config.json, which nobody has compared with the weights yet.
    """

    cos_sin_cache: Tensor

    def __init__(self, head_dim: int, rope: RopeConfig, max_positions: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self._head_dim = head_dim
        self._rope = rope
        self._max_positions = max_positions
        self._dtype = dtype
        self.register_buffer("cos_sin_cache", torch.empty(0, 2, head_dim // 2, dtype=dtype), persistent=False)

    def allocate(self, device: torch.device) -> None:
        """Computes the table on `device`."""
        frequencies = inverse_frequencies(self._rope, self._head_dim, self._max_positions)
        factor = attention_factor(self._rope)
        self.cos_sin_cache = cos_sin_table(frequencies.to(device), self._max_positions, factor, self._dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        slot_mapping: Tensor,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> Tensor:
        """Returns query [T, Hq, D] rotated by positions [T]; stores the rotated key and the value [T, Hkv, D].

        Positions must be below max_positions; where they go, `slot_mapping` [T] says, -1 being nowhere.

        Args:
            norms: of the heads of query and key before they are rotated, with one eps; None: they are not normalized.
        """
        query_norm, key_norm = (None, None) if norms is None else (norm.weight for norm in norms)
        return ops.rotate_and_cache(
            query,
            key,
            value,
            positions,
            self.cos_sin_cache,
            kv_cache,
            slot_mapping,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=0.0 if norms is None else norms[0].eps,
        )


def cos_sin_table(frequencies: Tensor, max_positions: int, factor: float, dtype: torch.dtype) -> Tensor:
    """Returns [max_positions, 2, D/2] of cos and sin times `factor`, computed in float32 from frequencies [D/2]."""
    device = frequencies.device
    table = torch.empty(max_positions, 2, frequencies.shape[0], dtype=dtype, device=device)
    # A few rows at a time: for a million positions the float32 temporaries would outgrow the table itself.
    for start in range(0, max_positions, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, max_positions)
        angles = torch.arange(start, stop, device=device).float()[:, None] * frequencies
        table[start:stop, 0] = angles.cos() * factor
        table[start:stop, 1] = angles.sin() * factor
    return table


def inverse_frequencies(rope: RopeConfig, dim: int, max_positions: int) -> Tensor:
    """Returns float32 [dim / 2]: radians per position of each pair of dimensions.

    Args:
        max_positions: the longest request; only `dynamic` scaling looks at it.
    """
    frequencies = _scaled(rope, dim, max_positions)
    return frequencies / torch.tensor(rope.frequency_factors) if rope.frequency_factors else frequencies


def _scaled(rope: RopeConfig, dim: int, max_positions: int) -> Tensor:
    if rope.rope_type == "dynamic":
        return _plain(_dynamic_theta(rope, dim, max_positions), dim)
    if rope.rope_type == "yarn":
        return _yarn(rope, dim)
    frequencies = _plain(rope.theta, dim)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """Returns what cos and sin are multiplied by: 1 but for yarn, whose scores it sharpens."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _dynamic_theta(rope: RopeConfig, dim: int, max_positions: int) -> float:
    original = rope.original_max_position_embeddings
    if dim <= 2:
        # The exponent below has no value; a single pair of dimensions cannot be stretched.
        return rope.theta
    stretch = rope.factor * max(max_positions, original) / original - (rope.factor - 1)
    return rope.theta * stretch ** (dim / (dim - 2))


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones left alone, those between blended."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > original / rope.low_freq_factor
    is_short = wavelengths < original / rope.high_freq_factor
    scaled = torch.where(is_long, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where(is_long | is_short, scaled, blended)


def _yarn(rope: RopeConfig, dim: int) -> Tensor:
    """Blends plain and stretched frequencies by how often each turns within the original context."""
    theta_powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain = 1.0 / theta_powers
    stretched = 1.0 / (rope.factor * theta_powers)
    low = _yarn_dimension(rope.beta_fast, rope, dim)
    high = _yarn_dimension(rope.beta_slow, rope, dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    plain_share = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return stretched * (1 - plain_share) + plain * plain_share


def _yarn_dimension(num_rotations: float, rope: RopeConfig, dim: int) -> float:
    """Returns the dimension that turns `num_rotations` times within the original context."""
    positions = rope.original_max_position_embeddings
    return dim * math.log(positions / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
