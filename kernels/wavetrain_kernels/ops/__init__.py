# SPDX-License-Identifier: Apache-2.0
"""The public functions: each validates its arguments, allocates its result, chooses an implementation, calls it."""

from wavetrain_kernels.kv_cache import KVCache, kv_cache_bytes_per_token
from wavetrain_kernels.lora_adapters import LoraAdapters, LoraBatch
from wavetrain_kernels.ops.attention import AttentionMetadata, paged_attention
from wavetrain_kernels.ops.dispatch import choose_kernels, implementation, kernel_set, new_program
from wavetrain_kernels.ops.embedding import embedding
from wavetrain_kernels.ops.kv_cache import allocate_kv_cache
from wavetrain_kernels.ops.linear import GatedActivation, gated_linear, linear, pack_quantized, pack_weight
from wavetrain_kernels.ops.lora import lora_expand, lora_shrink, sort_by_adapter
from wavetrain_kernels.ops.moe import empty_experts, empty_quantized_experts, fused_moe, pack_expert, route_experts
from wavetrain_kernels.ops.norm import add_rms_norm, rms_norm
from wavetrain_kernels.ops.rotary import rotate_and_cache
from wavetrain_kernels.ops.rows import select_rows
from wavetrain_kernels.ops.sampling import (
    apply_penalties,
    filter_thresholds,
    sample,
    sample_greedy,
    top_logprobs,
)
from wavetrain_kernels.packed_experts import PackedExperts
from wavetrain_kernels.packed_weight import PackedWeight
from wavetrain_kernels.program import Program
from wavetrain_kernels.quantized_inputs import QuantizedInputs, Rows
from wavetrain_kernels.quantized_weight import QuantizationScheme, QuantizedWeight
from wavetrain_kernels.reference.quantized_linear import dequantize
from wavetrain_kernels.wanted_tokens import WantedTokens

__all__ = [
    "AttentionMetadata",
    "GatedActivation",
    "KVCache",
    "LoraAdapters",
    "LoraBatch",
    "PackedExperts",
    "PackedWeight",
    "Program",
    "QuantizationScheme",
    "QuantizedInputs",
    "QuantizedWeight",
    "Rows",
    "WantedTokens",
    "add_rms_norm",
    "allocate_kv_cache",
    "apply_penalties",
    "choose_kernels",
    "dequantize",
    "embedding",
    "empty_experts",
    "empty_quantized_experts",
    "filter_thresholds",
    "fused_moe",
    "gated_linear",
    "implementation",
    "kernel_set",
    "kv_cache_bytes_per_token",
    "linear",
    "lora_expand",
    "lora_shrink",
    "new_program",
    "pack_expert",
    "pack_quantized",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "rotate_and_cache",
    "route_experts",
    "sample",
    "sample_greedy",
    "select_rows",
    "sort_by_adapter",
    "top_logprobs",
]
