# SPDX-License-Identifier: Apache-2.0
"""The reference functions as one kernel set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.reference.attention import paged_attention
from wavetrain_kernels.reference.embedding import embedding
from wavetrain_kernels.reference.gumbel import sample
from wavetrain_kernels.reference.linear import gated_linear, linear, pack_weight
from wavetrain_kernels.reference.lora import lora_expand, lora_shrink, num_lora_parts, sort_by_adapter
from wavetrain_kernels.reference.moe import (
    empty_experts,
    empty_quantized_experts,
    fused_moe,
    pack_expert,
    pack_quantized_expert,
    route_experts,
)
from wavetrain_kernels.reference.norm import add_rms_norm, rms_norm
from wavetrain_kernels.reference.quantized_linear import pack_quantized, quantized_gated_linear, quantized_linear
from wavetrain_kernels.reference.rotary import rotate_and_cache
from wavetrain_kernels.reference.rows import select_rows
from wavetrain_kernels.reference.sampling import (
    apply_penalties,
    filter_thresholds,
    sample_greedy,
    top_logprobs,
)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page at once; calloc'ed pages come zeroed from the kernel when first touched, so a 4 GiB
    # cache costs nothing until it is used.
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(*shape)


REFERENCE = KernelSet(
    name="reference",
    empty=_empty,
    zeros=_zeros,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotate_and_cache=rotate_and_cache,
    paged_attention=paged_attention,
    pack_weight=pack_weight,
    embedding=embedding,
    select_rows=select_rows,
    linear=linear,
    gated_linear=gated_linear,
    pack_quantized=pack_quantized,
    quantized_linear=quantized_linear,
    quantized_gated_linear=quantized_gated_linear,
    empty_experts=empty_experts,
    pack_expert=pack_expert,
    empty_quantized_experts=empty_quantized_experts,
    pack_quantized_expert=pack_quantized_expert,
    route_experts=route_experts,
    fused_moe=fused_moe,
    apply_penalties=apply_penalties,
    filter_thresholds=filter_thresholds,
    sample=sample,
    sample_greedy=sample_greedy,
    top_logprobs=top_logprobs,
    sort_by_adapter=sort_by_adapter,
    num_lora_parts=num_lora_parts,
    lora_shrink=lora_shrink,
    lora_expand=lora_expand,
)
