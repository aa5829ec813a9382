# SPDX-License-Identifier: Apache-2.0
"""The interface between the public functions and what computes them: a record of callables.

Everything here writes into tensors that the caller allocated and checked; nothing here validates or allocates a
result. A faster set for a device is `dataclasses.replace(REFERENCE, name=..., rms_norm=..., ...)`: it answers with its
own functions where it has them and with the reference where it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.kv_cache import KVCache
from wavetrain_kernels.lora_adapters import LoraAdapters, LoraBatch
from wavetrain_kernels.program import Program
from wavetrain_kernels.quantized_inputs import QuantizedInputKernels
from wavetrain_kernels.quantized_weight import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """One implementation of every operation. Argument lists are positional; outputs come first.

    Attributes:
        empty: (shape, dtype, device) -> an uninitialised tensor, where results go
        zeros: (shape, dtype, device) -> zeros that stay, such as a KV cache
        new_program: (capacity, dtype) -> an empty Program; None where it records nothing, at all or of this dtype
        rms_norm: (out, x, weight, eps, weight_offset)
        add_rms_norm: (out, residual_out, x, residual, weight, eps, weight_offset)
        rotate_and_cache: (query_out, query, key, value, positions, cos_sin_cache, cache, slot_mapping, query_norm,
            key_norm, eps); both norms or neither
        paged_attention: (out, query, cache, metadata, scale, sliding_window, soft_cap)
        apply_penalties: (logits, token_ids, output_counts, repetition, presence, frequency), in place
        filter_thresholds: (lowest_out, logits, temperature, top_k, top_p, min_p)
        sample: (token_ids_out, best_out, logits, seeds, positions, temperature, lowest)
        sample_greedy: (token_ids_out, best_out, logits)
        top_logprobs: (ids_out, logprobs_out, ranks_out, logits, token_ids)
        pack_weight: (weight, is_gated) -> the data of a PackedWeight
        embedding: (out, table, token_ids, scale, is_packed)
        select_rows: (out, x, indices)
        linear: (out, x, packed, bias)
        gated_linear: (out, x, packed, bias, activation)
        pack_quantized: (weight, dtype, is_gated) -> the data of a PackedWeight for inputs of `dtype`; None where these
            kernels have no form for the weight's scheme
        quantized_linear: (out, x, packed, bias)
        quantized_gated_linear: (out, x, packed, bias, activation)
        is_faster_in_int8: whether matrix products of integers are so much faster than those of bfloat16 that inputs of
            quantized weights are worth rounding to int8
        quantized_inputs: norms, gates and projections with 8-bit rows between them; None: there are none
        empty_experts: (num_experts, out_features, in_features, is_gated, dtype, device) -> the data of PackedExperts
        pack_expert: (packed, expert, weight, is_gated)
        empty_quantized_experts: (num_experts, like, dtype, is_gated) -> the data of PackedExperts for inputs of
            `dtype`; None where these kernels have no form for weights like that one
        pack_quantized_expert: (packed, expert, weight)
        route_experts: (weights_out, expert_ids_out, logits, renormalize)
        fused_moe: (out, x, gate_up, down, weights, expert_ids, num_units, activation); each projection's data is of
            either kind
        sort_by_adapter: (sorted_tokens_out, slot_starts_out, token_slots)
        num_lora_parts: (num_tokens, in_features) -> partial sums that `lora_shrink` leaves
        lora_shrink: (parts_out, x, adapters, batch)
        lora_expand: (out, parts, adapters, batch), added to `out`
    """

    name: str
    empty: Callable[[Sequence[int], torch.dtype, torch.device], Tensor]
    zeros: Callable[[Sequence[int], torch.dtype, torch.device], Tensor]
    new_program: Callable[[int, torch.dtype], Program | None] | None = None
    rms_norm: Callable[[Tensor, Tensor, Tensor, float, float], None]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float], None]
    rotate_and_cache: Callable[
        [
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            Tensor,
            KVCache,
            Tensor,
            Tensor | None,
            Tensor | None,
            float,
        ],
        None,
    ]
    paged_attention: Callable[[Tensor, Tensor, KVCache, AttentionMetadata, float, int | None, float | None], None]
    pack_weight: Callable[[Tensor, bool], Tensor]
    embedding: Callable[[Tensor, Tensor, Tensor, float, bool], None]
    select_rows: Callable[[Tensor, Tensor, Tensor], None]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    gated_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, str], None]
    pack_quantized: Callable[[QuantizedWeight, torch.dtype, bool], Any | None]
    quantized_linear: Callable[[Tensor, Tensor, Any, Tensor | None], None]
    quantized_gated_linear: Callable[[Tensor, Tensor, Any, Tensor | None, str], None]
    is_faster_in_int8: bool = False
    quantized_inputs: QuantizedInputKernels | None = None
    empty_experts: Callable[[int, int, int, bool, torch.dtype, torch.device], Tensor]
    pack_expert: Callable[[Tensor, int, Tensor, bool], None]
    empty_quantized_experts: Callable[[int, QuantizedWeight, torch.dtype, bool], Any | None]
    pack_quantized_expert: Callable[[Any, int, QuantizedWeight], None]
    route_experts: Callable[[Tensor, Tensor, Tensor, bool], None]
    fused_moe: Callable[[Tensor, Tensor, Any, Any, Tensor, Tensor, int, str], None]
    apply_penalties: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    filter_thresholds: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], None]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]
    sample_greedy: Callable[[Tensor, Tensor, Tensor], None]
    top_logprobs: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    sort_by_adapter: Callable[[Tensor, Tensor, Tensor], None]
    num_lora_parts: Callable[[int, int], int]
    lora_shrink: Callable[[Tensor, Tensor, LoraAdapters, LoraBatch], None]
    lora_expand: Callable[[Tensor, Tensor, LoraAdapters, LoraBatch], None]
