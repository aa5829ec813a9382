# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels under the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavetrain_kernels.cpu.build import build, find_compiler
from wavetrain_kernels.cpu.instruction_set import LEVELS, available_levels
from wavetrain_kernels.cpu.library import openmp_runtime

_FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def sanitizer_library(compiler: str) -> Path:
    """What must be loaded before everything else; skips where the compiler has none."""
    asked = subprocess.run(
        (compiler, "-print-file-name=libasan.so"), capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(asked).is_absolute():
        pytest.skip("the compiler has no libasan")
    return Path(asked)


@pytest.mark.parametrize(
    "name",
    [pytest.param(level.name, marks=() if level in (LEVELS[0], LEVELS[-1]) else pytest.mark.slow) for level in LEVELS],
)
def test_no_kernel_leaves_its_buffers(name: str, compiled_cache: Path) -> None:
    level = next((level for level in available_levels() if level.name == name), None)
    compiler = find_compiler()
    if level is None or compiler is None:
        pytest.skip("no such instruction set here" if level is None else "no C++ compiler")
    preloaded = sanitizer_library(compiler)
    library = build(level, compiler, openmp_runtime(), compiled_cache, extra_flags=_FLAGS)
    done = subprocess.run(
        (sys.executable, str(Path(__file__).with_name("every_kernel.py")), str(library)),
        env={
            **os.environ,
            "LD_PRELOAD": str(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
