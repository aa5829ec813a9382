# SPDX-License-Identifier: Apache-2.0
"""Compiling the kernels: one shared library per source, compiler and instruction set, kept in a cache folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wavetrain_kernels.cpu.instruction_set import InstructionSet
from wavetrain_kernels.errors import BuildError

SOURCE = Path(__file__).parent / "source"
_COMPILERS = ("g++", "c++", "clang++")
# -ffp-contract=off: only the fused products that the source asks for, so that every compiler adds alike.
# GCC 12 reports the undefined operands inside its own intrinsics as uninitialized.
_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-ignored-attributes",
)  # fmt: skip
_TIMEOUT_S = 120


def find_compiler(search_path: str | None = None) -> str | None:
    """Returns the path of a C++ compiler, None where there is none; looks in `search_path`, by default PATH."""
    return next((path for name in _COMPILERS if (path := shutil.which(name, path=search_path))), None)


def build(
    level: InstructionSet, compiler: str, openmp: Path, cache_dir: Path, *, extra_flags: Sequence[str] = ()
) -> Path:
    """Returns the library of the kernels for `level`; compiles it where the cache has none yet.

    Args:
        openmp: the OpenMP runtime of this process, which the library must share: two runtimes are two pools of
            threads on the same cores.
        extra_flags: for a build that is to be tested: sanitizers, or warnings as errors.

    Raises:
        BuildError: the compiler failed or the cache folder cannot be written; says what it said.
    """
    flags = (*_FLAGS, *level.compiler_flags, *extra_flags)
    library = cache_dir / f"wavetrain-{level.name}-{_key(compiler, openmp, flags)}.so"
    if not library.exists():
        _compile(library, (compiler, *flags, str(SOURCE / "kernels.cpp")), openmp)
    return library


def _compile(library: Path, command: Sequence[str], openmp: Path) -> None:
    # Another process may compile the same: each writes its own file, and the last one to finish takes the name.
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            partial = Path(folder) / library.name
            link = ("-o", str(partial), "-Wl,--as-needed", str(openmp))
            done = subprocess.run(
                (*command, *link), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, errors="replace"
            )
            if done.returncode:
                raise BuildError(f"{Path(command[0]).name} could not compile the CPU kernels:\n{done.stderr.strip()}")
            partial.rename(library)
    except OSError as error:
        raise BuildError(f"cannot write the CPU kernels: {error.strerror}: {library.parent}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{Path(command[0]).name} took over {_TIMEOUT_S} s to compile the CPU kernels") from error


def _key(compiler: str, openmp: Path, flags: Sequence[str]) -> str:
    """Returns a hash of all that goes into a library; of the compiler, its path, size and age."""
    digest = hashlib.sha256()
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    stat = Path(compiler).resolve().stat()
    digest.update(repr((compiler, stat.st_size, stat.st_mtime_ns, str(openmp), flags)).encode())
    return digest.hexdigest()[:16]
