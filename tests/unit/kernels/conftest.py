# SPDX-License-Identifier: Apache-2.0
"""The kernel sets that a test of the public functions runs over: the reference and every compiled level."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wavetrain_kernels.cpu.build import build, find_compiler
from wavetrain_kernels.cpu.instruction_set import LEVELS, InstructionSet, available_levels
from wavetrain_kernels.cpu.kernels import kernels_of
from wavetrain_kernels.cpu.library import openmp_runtime
from wavetrain_kernels.kernel_set import KernelSet
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kernels import REFERENCE


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the run's libraries are compiled to, each once: one folder for all processes of pytest-xdist."""
    if worker_id == "master":
        return tmp_path_factory.mktemp("kernels")
    shared = tmp_path_factory.getbasetemp().parent / "kernels"
    shared.mkdir(exist_ok=True)
    return shared


# What is written for AMX, with its instructions emulated: on every machine that has the rest.
_BF16 = next(level for level in LEVELS if level.name == "avx512_bf16")
EMULATED = InstructionSet("amx_emulated", _BF16.cpu_flags, (*_BF16.compiler_flags, "-DWAVETRAIN_EMULATE_TILES"))


@pytest.fixture(scope="session", params=["reference", EMULATED.name, *(level.name for level in LEVELS)])
def each_kernel_set(request: pytest.FixtureRequest, compiled_cache: Path) -> KernelSet:
    """Every kernel set that this machine can run, one after the other."""
    if request.param == "reference":
        return REFERENCE
    levels = available_levels()
    levels = (EMULATED, *levels) if _BF16 in levels else levels
    level = next((level for level in levels if level.name == request.param), None)
    if level is None:
        pytest.skip(f"this CPU has no {request.param}")
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    with (compiled_cache / f"{level.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and finds it compiled
        library = build(level, compiler, openmp_runtime(), compiled_cache, extra_flags=("-Werror",))
    return kernels_of(library)


@pytest.fixture
def kernels(each_kernel_set: KernelSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelSet]:
    """The set that answers for the CPU in this test, which may change the number of threads."""
    monkeypatch.setattr(dispatch, "_CHOSEN", {"cpu": each_kernel_set})
    num_threads = torch.get_num_threads()
    yield each_kernel_set
    torch.set_num_threads(num_threads)
