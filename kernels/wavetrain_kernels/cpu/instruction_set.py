# SPDX-License-Identifier: Apache-2.0
"""Which instruction sets this machine's cores have, and which of them a library is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """A level that kernels are compiled for.

    Attributes:
        name: as `wavetrain doctor` and the log say it.
        cpu_flags: what /proc/cpuinfo must list.
        compiler_flags: what makes a compiler use it.
        is_faster_in_int8: as KernelSet has it. On AMX few rows are bound by memory, whatever is multiplied.
    """

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]
    is_faster_in_int8: bool = False


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# All cores with bf16 products have these, but for those of one generation (Cooper Lake), which get the level below.
_AVX512_BF16 = (*_AVX512, "avx512_vnni", "avx512vbmi", "avx512_bf16")


def _level(name: str, *flags: str, is_faster_in_int8: bool = False) -> InstructionSet:
    # The kernel and the compiler spell some names differently: avx512_bf16 and avx512bf16, amx_tile and amx-tile.
    spelled = [flag.replace("avx512_", "avx512").replace("_", "-") for flag in flags]
    return InstructionSet(name, frozenset(flags), tuple(f"-m{flag}" for flag in spelled), is_faster_in_int8)


# Best first.
LEVELS = (
    _level("amx", *_AVX2, *_AVX512_BF16, "amx_tile", "amx_bf16", "amx_int8"),
    _level("avx512_bf16", *_AVX2, *_AVX512_BF16, is_faster_in_int8=True),
    _level("avx512", *_AVX2, *_AVX512, is_faster_in_int8=True),
    _level("avx2", *_AVX2, is_faster_in_int8=True),
)


def available_levels(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[InstructionSet, ...]:
    """Returns the levels this machine's cores can run, best first; none on a machine that is not x86-64."""
    flags = _cpu_flags(cpuinfo)
    return tuple(level for level in LEVELS if level.cpu_flags <= flags)


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())
