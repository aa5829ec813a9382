# SPDX-License-Identifier: Apache-2.0
"""The command that compiles every kernel ahead of time, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from wavetrain_kernels import aot
from wavetrain_kernels.gpu.aot_case import AotCase

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*command: str | Path, environment: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, encoding="utf-8", env=environment, check=False
    )


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of the cases that must not be shipped."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": str(cache)}
    done = run(Path(__file__).with_name("unfit_cases.py"), environment=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {result["name"]: result for result in results}


def test_what_is_fit(unfit):
    fit = unfit["fit"]
    assert fit["problems"] == []
    assert fit["matrix_instruction"] == "wgmma"
    assert 0 < fit["shared_bytes"] <= aot.SHARED_LIMITS["sm_90"]
    assert 0 < fit["registers"] <= 255
    assert fit["seconds"] > 0
    assert unfit["nor asked for elsewhere"]["problems"] == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no wgmma in a tile of 16", "multiplies with mma, not with wgmma"),
        ("both operands in shared memory", "takes no operand of wgmma from registers"),
        ("too much shared memory", "bytes of shared memory, sm_80 has 166912"),
        ("an argument is missing", "KeyError: 'STAGES'"),
        ("an argument is unknown", "the kernel has no arguments ['DEPTH']"),
        ("does not compile", "CompilationError"),
        ("spills", "a decode kernel spills"),
        ("stores nothing", "stores nothing"),
    ],
)
def test_what_is_not(unfit, name, problem):
    (found,) = unfit[name]["problems"]
    assert problem in found


def test_the_command_compiles_and_says_what_it_found(tmp_path):
    command = ("-m", "wavetrain_kernels.aot", "--only", "rms_norm/bf16/896x1,embedding/bf16/855", "--workers", "1")
    done = run(*command, "--json", "--arch", "sm_80,sm_90,sm_100", "--cache-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["arch"] for result in results} == set(aot.SHARED_LIMITS)
    names = {"rms_norm/bf16/896x1", "rms_norm/bf16/896x1/add", "embedding/bf16/855"}
    assert {result["name"] for result in results} == names
    assert all(result["registers"] and not result["problems"] for result in results)
    assert list(tmp_path.iterdir())
    assert "9 compiled, 0 not fit to ship" in done.stderr


@pytest.mark.slow
@pytest.mark.alone  # a compiler on every core
@pytest.mark.timeout(1200)
def test_every_kernel_is_fit_for_every_architecture(tmp_path):
    """Some 1,100 compiles: three or four minutes on two cores that have nothing else to do."""
    done = run("-m", "wavetrain_kernels.aot", "--json", "--cache-dir", tmp_path)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    unfit = {f"{result['arch']} {result['name']}": result["problems"] for result in results if result["problems"]}
    assert (done.returncode, unfit) == (0, {}), done.stderr[-500:]
    cases = aot.all_cases()
    assert len(results) == sum(len(case.archs or aot.SHARED_LIMITS) for case in cases.values())
    assert any(case.expects_wgmma for case in cases.values())
    assert any(case.is_decode for case in cases.values())


def test_every_module_is_asked_for_its_cases():
    cases = aot.all_cases()
    assert {name.partition("/")[0] for name in cases} >= {
        "rms_norm",
        "rotate_and_cache",
        "gated_activation",
        "embedding",
    }
    assert all(name == case.name for name, case in cases.items())


def test_the_status_says_that_something_is_unfit(monkeypatch, capsys):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    results = [
        aot.Compiled(name="good", arch="sm_80", registers=32),
        aot.Compiled(name="bad", arch="sm_90", problems=["spills"]),
    ]
    monkeypatch.setattr(aot, "_compile_all", lambda *_: iter(results))
    assert aot.main(["--only", "rms_norm", "--arch", "sm_80,sm_90"]) == 1
    out, progress = capsys.readouterr()
    assert "good" in out
    assert "bad\n    spills" in out
    assert "1 not fit to ship" in progress
    monkeypatch.setattr(aot, "_compile_all", lambda *_: iter(results[:1]))
    assert aot.main(["--json"]) == 0


def test_interpreted_kernels_cannot_be_compiled(monkeypatch, capsys):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert aot.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_cases_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert aot.main(["--only", "no such kernel"]) == 2
    assert "no case has no such kernel in its name" in capsys.readouterr().err


def test_architectures_that_are_not_known(capsys):
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--arch", "sm_90,sm_52"])
    assert stopped.value.code == 2
    assert "unknown: sm_52; known: sm_80, sm_90, sm_100" in capsys.readouterr().err


def test_two_cases_of_one_name(monkeypatch):
    case = AotCase("twice", None, {}, {}, 4, 1)
    monkeypatch.setattr("wavetrain_kernels.gpu.norm.aot_cases", lambda: [case, case])
    with pytest.raises(ValueError, match="two cases are named twice"):
        aot.all_cases()
