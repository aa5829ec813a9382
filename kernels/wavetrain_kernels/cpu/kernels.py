# SPDX-License-Identifier: Apache-2.0
"""The compiled functions as one kernel set."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path

import torch

from wavetrain_kernels.cpu.attention import AttentionKernels
from wavetrain_kernels.cpu.build import build, find_compiler
from wavetrain_kernels.cpu.embedding import EmbeddingKernels
from wavetrain_kernels.cpu.instruction_set import InstructionSet, available_levels
from wavetrain_kernels.cpu.library import Library, openmp_runtime
from wavetrain_kernels.cpu.linear import LinearKernels
from wavetrain_kernels.cpu.memory import huge_zeros
from wavetrain_kernels.cpu.moe import MoeKernels
from wavetrain_kernels.cpu.norm import NormKernels
from wavetrain_kernels.cpu.program import CpuProgram
from wavetrain_kernels.cpu.quantized_linear import QuantizedLinearKernels
from wavetrain_kernels.cpu.rotary import RotaryKernels
from wavetrain_kernels.cpu.sampling import SamplingKernels
from wavetrain_kernels.errors import BuildError
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.reference.kernels import REFERENCE

_LOG = logging.getLogger(__name__)


def load_cpu_kernels(cache_dir: Path) -> KernelSet:
    """Returns the kernels for the best instruction set of this machine, compiled now if they never were.

    Raises:
        BuildError: this machine has no instruction set they are written for, or no compiler, or it failed.
    """
    levels = available_levels()
    if not levels:
        raise BuildError("this CPU has none of the instruction sets that fast kernels are written for (AVX2 and up)")
    kernels = dataclasses.replace(
        kernels_of(build_library(levels[0], cache_dir)), is_faster_in_int8=levels[0].is_faster_in_int8
    )
    _LOG.info("CPU kernels for %s", levels[0].name)
    return kernels


def build_library(level: InstructionSet, cache_dir: Path) -> Path:
    """Returns the compiled library of one instruction set, compiled now if it never was.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found; install g++ (Debian: apt-get install g++)")
    return build(level, compiler, openmp_runtime(), cache_dir)


def kernels_of(path: Path) -> KernelSet:
    """Returns the functions of a compiled library as a set.

    Raises:
        BuildError: the library cannot be used here.
    """
    library = Library(path)
    linear, norm, sampling = LinearKernels(library), NormKernels(library), SamplingKernels(library)
    embedding, quantized = EmbeddingKernels(library), QuantizedLinearKernels(library)
    moe = MoeKernels(library, quantized)
    return dataclasses.replace(
        REFERENCE,
        name="cpu",
        empty=library.empty,
        zeros=lambda shape, dtype, _device: huge_zeros(shape, dtype),
        new_program=partial(_new_program, library),
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rotate_and_cache=RotaryKernels(library).rotate_and_cache,
        pack_weight=linear.pack_weight,
        embedding=embedding.embedding,
        select_rows=embedding.select_rows,
        linear=linear.linear,
        gated_linear=linear.gated_linear,
        pack_quantized=quantized.pack_quantized,
        quantized_linear=quantized.quantized_linear,
        quantized_gated_linear=quantized.quantized_gated_linear,
        empty_experts=moe.empty_experts,
        pack_expert=moe.pack_expert,
        empty_quantized_experts=moe.empty_quantized_experts,
        pack_quantized_expert=moe.pack_quantized_expert,
        route_experts=moe.route_experts,
        fused_moe=moe.fused_moe,
        paged_attention=AttentionKernels(library).paged_attention,
        apply_penalties=sampling.apply_penalties,
        filter_thresholds=sampling.filter_thresholds,
        sample=sampling.sample,
        sample_greedy=sampling.sample_greedy,
        top_logprobs=sampling.top_logprobs,
    )


def _new_program(library: Library, capacity: int, dtype: torch.dtype) -> CpuProgram | None:
    # In another dtype the reference answers, which runs nothing from a recording.
    return CpuProgram(library, capacity) if dtype is torch.bfloat16 else None
