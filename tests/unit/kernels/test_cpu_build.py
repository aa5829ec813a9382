# SPDX-License-Identifier: Apache-2.0
"""Finding out what a machine can run, and compiling for it once."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from wavetrain_kernels.cpu import kernels
from wavetrain_kernels.cpu.build import build, find_compiler
from wavetrain_kernels.cpu.instruction_set import LEVELS, available_levels
from wavetrain_kernels.cpu.library import Library, openmp_runtime
from wavetrain_kernels.errors import BuildError

AVX2, AMX = LEVELS[-1], LEVELS[0]


def fake_compiler(folder: Path, script: str) -> Path:
    """A compiler that runs a shell script, with the output's path as $out."""
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; out=$2\n{script}\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fpu sse2", []),
        ("avx2 fma", []),
        ("fpu avx2 fma f16c", ["avx2"]),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ["avx512", "avx2"]),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16", ["avx512", "avx2"]),
        (
            "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512vbmi avx512_bf16",
            ["avx512_bf16", "avx512", "avx2"],
        ),
        (
            "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512vbmi avx512_bf16 "
            "amx_tile amx_bf16 amx_int8",
            ["amx", "avx512_bf16", "avx512", "avx2"],
        ),
    ],
)
def test_levels_of_a_machine(tmp_path, flags, names):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs\t\t: spectre\n", encoding="utf-8")
    assert [level.name for level in available_levels(cpuinfo)] == names


def test_a_machine_without_flags_has_no_level(tmp_path):
    assert available_levels(tmp_path / "missing") == ()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("Features : asimd bf16\n", encoding="utf-8")
    assert available_levels(cpuinfo) == ()


def test_compilers_are_told_the_instruction_set():
    assert AVX2.compiler_flags == ("-mavx2", "-mfma", "-mf16c")
    assert {"-mavx512bf16", "-mavx512vbmi", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"} <= set(
        AMX.compiler_flags
    )


def test_the_first_of_the_compilers_is_taken(tmp_path):
    for name in ("g++", "clang++"):
        path = tmp_path / name
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)
    assert find_compiler(str(tmp_path)) == str(tmp_path / "g++")
    (tmp_path / "g++").unlink()
    assert find_compiler(str(tmp_path)) == str(tmp_path / "clang++")
    assert find_compiler(str(tmp_path / "empty")) is None


def test_a_library_is_compiled_once(tmp_path):
    openmp = openmp_runtime()
    cache_dir = tmp_path / "cache"
    compiler = fake_compiler(tmp_path, f'echo >> "{tmp_path}/runs"; echo made > "$out"')
    first = build(AVX2, str(compiler), openmp, cache_dir)
    assert first.read_text(encoding="utf-8") == "made\n"
    assert build(AVX2, str(compiler), openmp, cache_dir) == first
    others = {
        build(AMX, str(compiler), openmp, cache_dir),
        build(AVX2, str(compiler), openmp, cache_dir, extra_flags=("-g",)),
        build(AVX2, str(compiler), tmp_path / "another-libgomp.so", cache_dir),
    }
    assert len({first, *others}) == 4
    assert sorted(cache_dir.iterdir()) == sorted({first, *others})  # nothing else stays behind
    assert len((tmp_path / "runs").read_text(encoding="utf-8").splitlines()) == 4
    fake_compiler(tmp_path, 'echo another > "$out"')
    assert build(AVX2, str(compiler), openmp, cache_dir) not in {first, *others}


def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = fake_compiler(tmp_path, "echo 'unknown option -mavx2' >&2; exit 1")
    with pytest.raises(BuildError, match=r"fake-c\+\+ could not compile the CPU kernels:\nunknown option -mavx2"):
        build(AVX2, str(compiler), openmp_runtime(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    compiler = fake_compiler(tmp_path, 'echo made > "$out"')
    with pytest.raises(BuildError, match="cannot write the CPU kernels"):
        build(AVX2, str(compiler), openmp_runtime(), tmp_path / "cache")


def test_a_file_that_is_no_library(tmp_path):
    path = tmp_path / "broken.so"
    path.write_text("not ELF", encoding="utf-8")
    with pytest.raises(BuildError, match="cannot be loaded"):
        Library(path)


def test_a_machine_without_a_compiler_or_a_level(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    with pytest.raises(BuildError, match=r"install g\+\+ \(Debian: apt-get install g\+\+\)"):
        kernels.build_library(AVX2, tmp_path)
    monkeypatch.setattr(kernels, "available_levels", tuple)
    with pytest.raises(BuildError, match="none of the instruction sets"):
        kernels.load_cpu_kernels(tmp_path)


def test_a_process_without_openmp(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 00:00 1    /usr/lib/libc.so.6\n7f02-7f03 rw-p 0 00:00 0\n", encoding="utf-8"
    )
    with pytest.raises(BuildError, match="without OpenMP"):
        openmp_runtime(maps)
    maps.write_text("7f00-7f01 r-xp 00000000 00:00 1    /a folder/libgomp-98b21ff3.so.1\n", encoding="utf-8")
    assert openmp_runtime(maps) == Path("/a folder/libgomp-98b21ff3.so.1")


def test_all_levels_of_this_machine_are_built_ahead_of_time(tmp_path):
    if find_compiler() is None or not available_levels():
        pytest.skip("no C++ compiler, or no level")
    command = (sys.executable, "-m", "wavetrain_kernels.cpu.build_all", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["level"] for report in reports] == [level.name for level in available_levels()]
    assert all(report["error"] is None for report in reports)
    libraries = sorted(tmp_path.iterdir())
    assert len(libraries) == len(reports)
    kernels.load_cpu_kernels(tmp_path)
    assert sorted(tmp_path.iterdir()) == libraries  # what the engine takes is what was built
