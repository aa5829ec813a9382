# SPDX-License-Identifier: Apache-2.0
"""What a kernel module tells `wavetrain_kernels.aot`: the configurations of its kernels that we ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One kernel with one set of constexprs, to be compiled without a GPU.

    Every module with kernels has a function `aot_cases() -> Iterable[AotCase]`.

    Attributes:
        name: unique over all modules: `rms_norm/bf16/h4096`, say.
        kernel: the `@triton.jit` function.
        signature: type of every argument that is no constexpr, in Triton's spelling: `*bf16`, `i32`, `fp32`. What the
            launcher would specialise may be said behind a colon: `i32:16` is a multiple of 16. A pointer is aligned to
            16 bytes unless the kernel has it in `do_not_specialize` or `do_not_specialize_on_alignment`.
        constexprs: value of every other argument.
        num_warps, num_stages, maxnreg: as at the launch.
        is_decode: runs in every decode step, so it must not spill registers.
        expects_wgmma: on sm_90 its matrix products must be warp-group instructions.
        expects_register_operand: with their left operand in registers.
        archs: the only architectures that are given it; None: all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    is_decode: bool = False
    expects_wgmma: bool = False
    expects_register_operand: bool = False
    maxnreg: int | None = None
    archs: tuple[str, ...] | None = None
