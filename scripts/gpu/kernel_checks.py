# SPDX-License-Identifier: Apache-2.0
"""The kernels on the device: the unit tests, where pytest is, and every contest of bench_kernels in its full size."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu import machine
from gpu.attention_contests import attention_contests
from gpu.greedy_checks import Check
from gpu.layer_contests import layer_contests, lora_contests
from gpu.moe_contests import moe_contests
from gpu.quantized_contests import quantized_contests
from gpu.sampling_contests import sampling_contests
from gpu.setting import Setting

_UNIT_TESTS = machine.ROOT / "tests" / "unit"
_TESTS = (_UNIT_TESTS / "kernels" / "gpu", _UNIT_TESTS / "engine" / "test_gpu_engine.py")
# Compiles for other devices, which needs none.
_NOT_OF_A_GPU = _UNIT_TESTS / "kernels" / "gpu" / "test_aot.py"
# Of one test: compiling is in it, and others compile at the same time.
_TEST_TIMEOUT_S = 240
# Characters from the end of what pytest says, where something is wrong.
_SHOWN_OF_LOG = 5000
# The plugins that pyproject.toml configures need not be there.
_SETTINGS = """[pytest]
addopts = --import-mode=importlib -p no:cacheprovider
pythonpath = tests scripts
markers =
    server: -
    slow: -
    gpu: -
"""


def unit_test_checks(folder: Path, selection: str, timeout_s: float) -> Iterator[Check]:
    """Runs the unit tests of the GPU kernels, and of the engine on a GPU; yields a check for each of their files."""
    settings, report = folder / "pytest.ini", folder / "report.xml"
    settings.write_text(_SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", *map(str, _TESTS), "-q", "-c", str(settings)]
    command += [f"--rootdir={machine.ROOT}", "--tb=short", f"--ignore={_NOT_OF_A_GPU}"]
    if not selection and importlib.util.find_spec("xdist") is not None:  # compiling is most of it
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += [f"--timeout={_TEST_TIMEOUT_S}", "--timeout-method=thread"]
    command += [f"--junitxml={report}", f"--basetemp={folder / 'tests'}", *(["-k", selection] if selection else [])]
    environment = {**machine.child_environment(), "PYTEST_PLUGINS": "gpu.stand_in_plugin"}
    print(f"unit tests, at most {timeout_s:.0f} s", flush=True)
    log = folder / "log"
    with log.open("w", encoding="utf-8") as file:
        try:
            run = partial(subprocess.run, command, env=environment, timeout=timeout_s, check=False)
            problem = "" if run(stdout=file, stderr=subprocess.STDOUT).returncode == 0 else "no report"
        except subprocess.TimeoutExpired:
            problem = f"not done after {timeout_s:.0f} s"
    if problem:
        print(log.read_text(encoding="utf-8", errors="replace")[-_SHOWN_OF_LOG:], flush=True)
    if report.exists():
        yield from read_report(report)
    else:
        yield Check("unit tests of the kernels", is_right=False, detail=problem or "no report")


def read_report(report: Path) -> list[Check]:
    """Returns a check for each test file that a JUnit report names."""
    counts: dict[str, dict[str, int]] = {}
    first: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = (case.get("classname") or "?").rpartition(".")[2]
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        found = counts.setdefault(name, {})
        found[kind] = found.get(kind, 0) + 1
        if kind in ("failure", "error"):
            reason = next((child.get("message", "") for child in case if child.tag == kind), "")
            first.setdefault(name, f"{case.get('name')}: {' '.join(reason.split())[:200]}")
    if not counts:
        return [Check("unit tests of the kernels", is_right=False, detail="none ran")]
    return [
        Check(
            f"tests of {name}",
            is_right=name not in first,
            detail=", ".join(f"{number} {kind}" for kind, number in sorted(found.items()))
            + (f"; first: {first[name]}" if name in first else ""),
        )
        for name, found in sorted(counts.items())
    ]


def contest_checks(setting: Setting) -> Iterator[Check]:
    """Runs our side of every contest once and compares it with the truth."""
    where: dict[str, Any] = {"device": setting.device, "is_dry_run": setting.is_dry_run}
    for dtype in [setting.dtype] if setting.is_dry_run else [torch.bfloat16, torch.float16]:
        groups = {
            "attention": lambda dtype=dtype: attention_contests(dtype, **where),
            "layer": lambda dtype=dtype: layer_contests(dtype, **where),
            "sampling": lambda: sampling_contests(**where),
            "quantized": lambda dtype=dtype: quantized_contests(dtype, **where),
            "moe": lambda dtype=dtype: moe_contests(dtype, **where),
            "lora": lambda dtype=dtype: lora_contests(dtype, **where),
        }
        kind = str(dtype).removeprefix("torch.")
        for group, make in groups.items():
            yield from _group_checks(f"{group}, {kind}", make, setting)


def _group_checks(name: str, make: Any, setting: Setting) -> Iterator[Check]:
    """Yields one check for a group: its worst contest, in shares of what it may be wrong by."""
    num_contests, worst, worst_case = 0, 0.0, ""
    try:
        with torch.inference_mode():
            for contest in make():
                error = contest.check(contest.ours)
                share = error / contest.tolerance if contest.tolerance else (0.0 if error == 0 else float("inf"))
                num_contests += 1
                if not share <= worst:
                    worst, worst_case = share, f"{contest.group}, {contest.case}, error {error:.2g}"
                setting.forget()
    except Exception as error:
        yield Check(f"full sizes: {name}", is_right=False, detail=f"{type(error).__name__}: {error}"[:300])
        return
    detail = f"{num_contests} cases; worst: {worst_case or 'all exact'}"
    yield Check(f"full sizes: {name}", is_right=worst <= 1, detail=detail)
