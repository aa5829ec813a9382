# SPDX-License-Identifier: Apache-2.0
"""`python -m wavetrain_kernels.aot --arch sm_80,sm_90,sm_100 --json`: compiles every GPU kernel we ship, without a GPU.

It proves what can be proved that way: every configuration compiles for every architecture and fits into its shared
memory, decode kernels keep their values in registers, Hopper's prefill kernels use its warp-group matrix instructions.
Exit status: 0, or 1 where one does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import wavetrain_kernels.gpu
from wavetrain_kernels.gpu.aot_case import AotCase

_KIB = 1024
# Shared memory that one block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMITS = {"sm_80": 163 * _KIB, "sm_90": 227 * _KIB, "sm_100": 227 * _KIB}
_MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
# wgmma's left operand, its second, is a list of registers, and no descriptor of shared memory.
_REGISTER_OPERAND = re.compile(r"wgmma\.mma_async[^{;]*\{[^}]*\}, *\{")
# Plain stores, reductions and atomics, or copies of whole tiles.
_STORE = re.compile(r"\b(?:st|red|atom)\.[\w.]*global|\bcp\.(?:reduce\.)?async\.bulk[\w.]*\.global\b")
_POINTER_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of one case on one architecture.

    Attributes:
        spill_bytes: registers that went to memory, per thread.
        matrix_instruction: `wgmma`, `tcgen05` or `mma`; None: it multiplies no tiles.
        problems: why we do not ship it like that; empty: nothing.
    """

    name: str
    arch: str
    shared_bytes: int = 0
    registers: int = 0
    spill_bytes: int = 0
    matrix_instruction: str | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list[str])


def all_cases() -> dict[str, AotCase]:
    """Returns the cases of every module of `gpu` by name.

    Raises:
        ValueError: two have one name.
    """
    cases: dict[str, AotCase] = {}
    for module in pkgutil.iter_modules(wavetrain_kernels.gpu.__path__):
        found = importlib.import_module(f"wavetrain_kernels.gpu.{module.name}")
        for case in getattr(found, "aot_cases", tuple)():
            if case.name in cases:
                raise ValueError(f"two cases are named {case.name}")
            cases[case.name] = case
    return cases


def compile_case(case: AotCase, arch: str) -> Compiled:
    """Compiles one case and looks for what may be wrong with the result. Raises nothing: what fails is a problem."""
    start = time.perf_counter()
    try:
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        kernel: Any = triton.compile(_source(case), target=target, options=options)
        registers, spill_bytes = _resources(kernel.asm["cubin"])
    except Exception as error:  # of the compiler, whatever it is
        lines = str(error).strip().splitlines() or [""]
        reason = " ".join(dict.fromkeys((lines[0], lines[-1])))  # the place, and what is wrong there
        return Compiled(name=case.name, arch=arch, problems=[f"{type(error).__name__}: {reason}"])
    ptx = kernel.asm["ptx"]
    result = Compiled(
        name=case.name,
        arch=arch,
        shared_bytes=kernel.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
        matrix_instruction=next((name for name, text in _MATRIX_INSTRUCTIONS.items() if text in ptx), None),
        seconds=round(time.perf_counter() - start, 3),
    )
    return replace(result, problems=list(_problems(case, result, ptx)))


def _source(case: AotCase) -> ASTSource:
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    constexprs = dict(case.constexprs)
    for index, parameter in enumerate(case.kernel.params):
        if parameter.name in constexprs:
            signature[parameter.name] = "constexpr"
            continue
        kind, _, special = case.signature[parameter.name].partition(":")
        is_free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if kind.startswith("*") and not special and not is_free:
            special = str(_POINTER_ALIGNMENT)
        if special == "1":  # as the launcher does
            constexprs[parameter.name], kind = 1, "constexpr"
        elif special:
            attributes[(index,)] = [["tt.divisibility", int(special)]]
        signature[parameter.name] = kind
    unknown = case.signature.keys() - signature.keys() | constexprs.keys() - signature.keys()
    if unknown:
        raise ValueError(f"the kernel has no arguments {sorted(unknown)}")
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Returns registers, and bytes of stack, of a thread: Triton puts nothing on the stack but spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2])


def _problems(case: AotCase, result: Compiled, ptx: str) -> Iterator[str]:
    limit = SHARED_LIMITS[result.arch]
    if result.shared_bytes > limit:
        yield f"{result.shared_bytes} bytes of shared memory, {result.arch} has {limit}"
    if not _STORE.search(ptx):
        yield "stores nothing: the compiler has dropped the whole kernel"
    if case.is_decode and result.spill_bytes:
        yield f"a decode kernel spills {result.spill_bytes} bytes of registers"
    if case.expects_wgmma and result.arch == "sm_90" and result.matrix_instruction != "wgmma":
        yield f"multiplies with {result.matrix_instruction}, not with wgmma"
    if case.expects_register_operand and result.arch == "sm_90" and not _REGISTER_OPERAND.search(ptx):
        yield "takes no operand of wgmma from registers"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    if knobs.runtime.interpret:
        sys.stderr.write("TRITON_INTERPRET is set: interpreted kernels cannot be compiled\n")
        return 2
    cases = all_cases()
    names = [name for name in cases if any(text in name for text in options.only)]
    if not names:
        sys.stderr.write(f"no case has {' or '.join(options.only)} in its name\n")
        return 2
    start = time.perf_counter()
    jobs = [(name, arch) for name in names for arch in options.arch if arch in (cases[name].archs or options.arch)]
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, result in enumerate(_compile_all(jobs, options.workers, options.cache_dir or Path(folder)), 1):
            num_failed += bool(result.problems)
            sys.stdout.write((json.dumps(asdict(result)) if options.json else _line(result)) + "\n")
            sys.stdout.flush()
            sys.stderr.write(f"\r{number}/{len(jobs)} ")
    sys.stderr.write(f"\r{len(jobs)} compiled, {num_failed} not fit to ship, {time.perf_counter() - start:.0f} s\n")
    return 1 if num_failed else 0


def _compile_all(jobs: list[tuple[str, str]], num_workers: int, cache_dir: Path) -> Iterator[Compiled]:
    context = multiprocessing.get_context("spawn")  # a fork would take torch's locks with it
    with ProcessPoolExecutor(num_workers, context, initializer=_prepare, initargs=(str(cache_dir),)) as pool:
        for done in as_completed([pool.submit(_compile_named, *job) for job in jobs]):
            yield done.result()


def _prepare(cache_dir: str) -> None:
    knobs.cache.dir = cache_dir


def _compile_named(name: str, arch: str) -> Compiled:
    return compile_case(all_cases()[name], arch)


def _line(result: Compiled) -> str:
    numbers = f"{result.registers:3} registers, {result.spill_bytes} spilt, {result.shared_bytes:6} shared"
    problems = "".join(f"\n    {problem}" for problem in result.problems)
    return f"{result.arch:7}{numbers}, {result.matrix_instruction or '-':7} {result.name}{problems}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wavetrain_kernels.aot", description="Compiles every GPU kernel.")
    parser.add_argument("--arch", type=_archs, default=list(SHARED_LIMITS), help=",".join(SHARED_LIMITS))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--only", type=_texts, default=[""], metavar="TEXT,...", help="cases with one of these in their names"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--cache-dir", type=Path, help="keeps what is compiled here (default: nowhere)")
    return parser


def _texts(text: str) -> list[str]:
    return text.split(",")


def _archs(text: str) -> list[str]:
    archs = text.split(",")
    if unknown := [arch for arch in archs if arch not in SHARED_LIMITS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(SHARED_LIMITS)}")
    return archs


if __name__ == "__main__":
    sys.exit(main())
