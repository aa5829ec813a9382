# SPDX-License-Identifier: Apache-2.0
"""The GPU functions as one kernel set."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from triton import knobs

from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.gpu import (
    attention,
    embedding,
    filters,
    greedy,
    gumbel,
    linear,
    logprobs,
    lora,
    moe,
    moe_routing,
    norm,
    penalties,
    quantized_experts,
    quantized_linear,
    quantized_rows,
    rotary,
)
from wavetrain_kernels.gpu.launch import count_compilations
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.quantized_inputs import QuantizedInputKernels
from wavetrain_kernels.reference.kernels import REFERENCE

_LOG = logging.getLogger(__name__)

# Triton's matrix products need Volta's tensor cores.
_OLDEST_CAPABILITY = (7, 0)

GPU = dataclasses.replace(
    REFERENCE,
    name="gpu",
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    rotate_and_cache=rotary.rotate_and_cache,
    paged_attention=attention.paged_attention,
    pack_weight=linear.pack_weight,
    embedding=embedding.embedding,
    linear=linear.linear,
    gated_linear=linear.gated_linear,
    pack_quantized=quantized_linear.pack_quantized,
    quantized_linear=quantized_linear.quantized_linear,
    quantized_gated_linear=quantized_linear.quantized_gated_linear,
    quantized_inputs=QuantizedInputKernels(
        new=quantized_rows.new_inputs,
        rms_norm=quantized_rows.rms_norm,
        add_rms_norm=quantized_rows.add_rms_norm,
        linear=quantized_linear.quantized_linear,
        gated_linear=quantized_linear.quantized_gated_linear,
    ),
    empty_quantized_experts=quantized_experts.empty_quantized_experts,
    pack_quantized_expert=quantized_experts.pack_quantized_expert,
    route_experts=moe_routing.route_experts,
    fused_moe=moe.fused_moe,
    apply_penalties=penalties.apply_penalties,
    filter_thresholds=filters.filter_thresholds,
    sample=gumbel.sample,
    sample_greedy=greedy.sample_greedy,
    top_logprobs=logprobs.top_logprobs,
    sort_by_adapter=lora.sort_by_adapter,
    num_lora_parts=lora.num_lora_parts,
    lora_shrink=lora.lora_shrink,
    lora_expand=lora.lora_expand,
)


def load_gpu_kernels(cache_dir: Path) -> KernelSet:
    """Returns the kernels for this machine's GPU. What Triton compiles is kept below `cache_dir`.

    Raises:
        UnsupportedDevice: there is no GPU here, or it is too old.
    """
    if not torch.cuda.is_available():
        raise UnsupportedDevice("the gpu kernels need an NVIDIA GPU, and torch sees none")
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_CAPABILITY:
        raise UnsupportedDevice(
            f"the gpu kernels need compute capability {_version(_OLDEST_CAPABILITY)} or newer, "
            f"{torch.cuda.get_device_name()} has {_version(capability)}"
        )
    knobs.cache.dir = str(cache_dir / "triton")
    # `ops.linear` promises sums in float32; by default cuBLAS may add the parts of a long sum in the inputs' type.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    count_compilations()
    _LOG.info("GPU kernels for %s, compute capability %s", torch.cuda.get_device_name(), _version(capability))
    return GPU


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
