# SPDX-License-Identifier: Apache-2.0
"""The GPU programs in dry runs: on the CPU, with interpreted kernels and tiny models, all of them but the timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def dry_run(program: str, out: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, str(SCRIPTS / program), "--dry-run", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert out.exists(), done.stderr[-2000:]
    return done.returncode, done.stdout, json.loads(out.read_text(encoding="utf-8"))


def test_bench_kernels_runs_every_contest(tmp_path: Path) -> None:
    status, text, results = dry_run("bench_kernels.py", tmp_path / "out.json")
    assert status == 0, text
    groups = {record["group"] for record in results["contests"]}
    assert {"decode attention", "prefill attention", "rope + kv write", "moe", "sampling"} <= groups
    assert all(record["us"]["median"] > 0 for record in results["contests"])
    assert results["dry_run"]
    assert all(bar["kept"] is None for bar in results["bars"])
    assert results["limits"]["copy_gb_s"]["median"] > 0


def test_bench_gpu_runs_every_part(tmp_path: Path) -> None:
    status, text, results = dry_run("bench_gpu.py", tmp_path / "out.json", "--no-peer")
    assert status == 0, text
    assert {"start", "facts", "limits", "step", "idle", "replay", "throughput"} <= results["parts"].keys()
    assert results["parts"]["step"]["intercept_ms"] > 0
    assert results["parts"]["throughput"]["output_tokens_per_s"] > 0


@pytest.mark.slow
def test_bench_gpu_has_a_peer(tmp_path: Path) -> None:
    status, text, results = dry_run("bench_gpu.py", tmp_path / "out.json", "--parts", "throughput")
    assert status == 0, text
    assert results["parts"]["throughput"]["ours_over_theirs"] > 0


def test_gpu_check_finds_nothing_wrong(tmp_path: Path) -> None:
    status, text, results = dry_run("gpu_check.py", tmp_path / "out.json")
    assert status == 0, text
    assert {check["part"] for check in results["results"]} == {"kernels", "sizes", "greedy"}
    assert json.loads(text.splitlines()[-1])["gpu_check"]["wrong"] == 0


def test_tune_kernels_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    out, progress = tmp_path / "tuned.json", tmp_path / "tuned.progress.json"
    status, _, results = dry_run("tune_kernels.py", out, "--only", "lora", "--time-limit-s", "4")
    assert status == 3
    assert results["device"] == "dry run"
    before = json.loads(progress.read_text(encoding="utf-8"))["times"]
    dry_run("tune_kernels.py", out, "--only", "lora", "--time-limit-s", "8")
    after = json.loads(progress.read_text(encoding="utf-8"))["times"]
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before
