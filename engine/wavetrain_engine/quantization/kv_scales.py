# SPDX-License-Identifier: Apache-2.0
"""Scales that a checkpoint holds for a quantized KV cache. Without torch.

They are not needed: the cache finds a scale for every token and head by itself, which is finer than one for a layer.
"""

from __future__ import annotations

import re

# Of vLLM, of older compressed-tensors, and of fp8 checkpoints by other tools.
_NAME = re.compile(
    r".*\.self_attn\.(?:attn\.)?(?:[kvq]_(?:scale|zero_point)|kv_scale|[kvq]_proj\.(?:output_(?:scale|zero_point)|[kvq]_scale))"
)


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of this name is such a scale."""
    return _NAME.fullmatch(name) is not None
