# SPDX-License-Identifier: Apache-2.0
"""The tensors behind the block tables: a cache of keys and values per layer, in the dtype that was asked for."""

from __future__ import annotations

import dataclasses

import torch

from wavetrain_engine.errors import ConfigError
from wavetrain_engine.layers.attention import KVCache, KVCacheSpec
from wavetrain_engine.models.model import Model
from wavetrain_kernels import ops

# By the names that --kv-cache-dtype has for them.
_QUANTIZED_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def kv_cache_spec(model: Model, kv_cache_dtype: str) -> KVCacheSpec:
    """Returns what the model's cache is made of where --kv-cache-dtype is `kv_cache_dtype`.

    Raises:
        ConfigError: it is a dtype that is neither the model's own nor one that caches are quantized to.
    """
    spec = model.kv_cache_spec()
    if kv_cache_dtype in _QUANTIZED_DTYPES:
        return dataclasses.replace(spec, dtype=_QUANTIZED_DTYPES[kv_cache_dtype])
    if kv_cache_dtype not in ("auto", spec.dtype_name):
        raise ConfigError(
            f"--kv-cache-dtype {kv_cache_dtype}: the model computes in {spec.dtype_name}, and a cache that is not "
            f"quantized holds just that; leave it to auto, use fp8 or int8, or set --dtype {kv_cache_dtype}"
        )
    return spec


def allocate_kv_caches(spec: KVCacheSpec, num_blocks: int, block_size: int, device: torch.device) -> list[KVCache]:
    """Allocates zeroed caches [num_blocks, num_kv_heads, block_size, head_dim], one per layer.

    Zeroed only to be the same in every run: attention never looks at what nobody wrote (docs/decisions/0002).
    """
    shape = spec.shape(num_blocks, block_size)
    return [ops.allocate_kv_cache(shape, spec.dtype, device) for _ in range(spec.num_layers)]
