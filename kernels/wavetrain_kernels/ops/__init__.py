# SPDX-License-Identifier: Apache-2.0
"""The public functions: each validates its arguments, allocates its result, chooses an implementation, calls it.

The KV cache of a layer is two tensors [num_blocks, num_kv_heads, block_size, head_dim]; a token's slot is
block_id * block_size + offset.
"""

from wavetrain_kernels.ops.activation import gelu_tanh_and_mul, silu_and_mul
from wavetrain_kernels.ops.attention import AttentionMetadata, paged_attention
from wavetrain_kernels.ops.dispatch import choose_kernels, implementation, kernel_set
from wavetrain_kernels.ops.kv_cache import write_kv_cache
from wavetrain_kernels.ops.linear import linear
from wavetrain_kernels.ops.norm import add_rms_norm, rms_norm
from wavetrain_kernels.ops.rotary import rotary_embedding
from wavetrain_kernels.ops.sampling import (
    apply_penalties,
    apply_top_k_top_p_min_p,
    sample,
    sample_greedy,
    top_logprobs,
)

__all__ = [
    "AttentionMetadata",
    "add_rms_norm",
    "apply_penalties",
    "apply_top_k_top_p_min_p",
    "choose_kernels",
    "gelu_tanh_and_mul",
    "implementation",
    "kernel_set",
    "linear",
    "paged_attention",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "sample_greedy",
    "silu_and_mul",
    "top_logprobs",
    "write_kv_cache",
]
