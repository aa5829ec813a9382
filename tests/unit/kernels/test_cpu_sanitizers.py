# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels under the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from wavetrain_kernels.cpu.build import build, find_compiler
from wavetrain_kernels.cpu.instruction_set import available_levels
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


def test_no_kernel_leaves_its_buffers(compiled_cache: Path) -> None:
    """Of all instruction sets in one process, as torch takes longer to import under a sanitizer than they to run."""
    levels, compiler = available_levels(), find_compiler()
    if not levels or compiler is None:
        pytest.skip("no C++ compiler" if levels else "no instruction set that kernels are written for")
    preloaded = sanitizer_library(compiler)
    make = partial(build, compiler=compiler, openmp=openmp_runtime(), cache_dir=compiled_cache, extra_flags=_FLAGS)
    with ThreadPoolExecutor() as pool:
        libraries = list(pool.map(make, levels))
    done = subprocess.run(
        (sys.executable, str(Path(__file__).with_name("every_kernel.py")), *map(str, libraries)),
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
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
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr[-4000:]}"
    assert done.stdout.splitlines() == [library.name for library in libraries]
