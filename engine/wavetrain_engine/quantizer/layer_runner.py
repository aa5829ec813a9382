# SPDX-License-Identifier: Apache-2.0
"""Runs windows of text through one layer, and lets others look at what its matrices read and its cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.worker.kv_cache import allocate_kv_caches
from wavetrain_kernels.ops import AttentionMetadata

# W = windows, S = tokens of a window, H = hidden size, B = windows that are computed at once.

_BLOCK_SIZE = 16
_TOKENS_AT_ONCE = 4096

Watch = Callable[[Tensor], None]
"""Called with the input [T, K] of a module, for each batch."""


@dataclass(slots=True)
class CacheRange:
    """The largest magnitudes that keys and values had."""

    key: float = 0.0
    value: float = 0.0

    def add(self, cache: KVCache) -> None:
        """Takes a cache into account that held nothing but zeros before the last batch."""
        self.key = max(self.key, cache.key.abs().amax().item())
        self.value = max(self.value, cache.value.abs().amax().item())


class LayerRunner:
    """Runs models, or stages of one, over windows of equal length.

    Args:
        window_tokens: S.
    """

    def __init__(self, window_tokens: int) -> None:
        self._window_tokens = window_tokens
        self._batch = max(1, _TOKENS_AT_ONCE // window_tokens)

    @torch.inference_mode()
    def run(
        self,
        model: Model,
        inputs: Tensor,
        take: Callable[[int, Tensor], None],
        *,
        watched: dict[str, Watch] | None = None,
        cache_range: CacheRange | None = None,
    ) -> None:
        """Runs inputs [W, S, ...] through a model: token ids, or hidden states where it is a stage.

        Args:
            take: is given the index of a batch's first window, and its outputs [B, S, H].
            watched: by the name of a module.
            cache_range: of the first layer.
        """
        modules = {model.get_submodule(name): watch for name, watch in (watched or {}).items()}
        for module, watch in modules.items():
            module.forward = _watched(module.forward, watch)
        try:
            for start in range(0, inputs.shape[0], self._batch):
                batch = inputs[start : start + self._batch]
                caches, positions, metadata = self._layout(model, batch.shape[0])
                output = model(batch.flatten(0, 1), positions, caches, metadata)
                take(start, output.unflatten(0, (batch.shape[0], -1)))
                if cache_range is not None:
                    cache_range.add(caches[0])
        finally:
            for module in modules:
                del module.forward  # and the class's own is back

    def _layout(self, model: Model, num_windows: int) -> tuple[list[KVCache], Tensor, AttentionMetadata]:
        """Returns caches, positions and layout of so many windows, each from its first token on."""
        length, layers = self._window_tokens, model.layers
        assert isinstance(layers, torch.nn.ModuleList), "every family has layers"
        blocks = -(-length // _BLOCK_SIZE)
        spec = replace(model.kv_cache_spec(), num_layers=len(layers))
        caches = allocate_kv_caches(spec, num_windows * blocks, _BLOCK_SIZE, torch.device("cpu"))
        tables = torch.arange(num_windows * blocks, dtype=torch.int32).view(num_windows, blocks)
        offsets = torch.arange(length)
        slots = (torch.arange(num_windows)[:, None] * blocks * _BLOCK_SIZE + offsets).flatten()
        metadata = AttentionMetadata.build([length] * num_windows, [length] * num_windows, tables, slots)
        return caches, offsets.repeat(num_windows), metadata


def _watched(forward: Callable[..., Tensor], watch: Watch) -> Callable[..., Tensor]:
    # Not a hook: those are passed by where a module calls its own `forward`.
    def look(x: Tensor, *others: Any) -> Tensor:
        watch(x)
        return forward(x, *others)

    return look
