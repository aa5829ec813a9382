# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs run on a tiny checkpoint and say what the pages quote; no figure is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.tiny_checkpoints import make_tiny_checkpoint

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
VOCAB_SIZE = 16384  # prompts are drawn below 16000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), with_tokenizer=True, vocab_size=VOCAB_SIZE)


def run(program: str, *arguments: str, commands: str = "") -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPTS / program), *arguments]
    done = subprocess.run(command, input=commands, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_bench_engine_prints_a_line_for_each_case(checkpoint: Path) -> None:
    flags = ("--rounds", "1", "--max-num-seqs", "4", "--kv-cache-memory", "1000000")
    lines = run("bench_engine.py", "--model", str(checkpoint), "--cases", "1x8x4,3x8x4", *flags)
    assert [(line["engine"], line["case"]) for line in lines] == [("wavetrain", "1x8x4"), ("wavetrain", "3x8x4")]
    assert all(line["output_tokens_per_s"] > 0 for line in lines)
    (line,) = run("bench_engine.py", "--model", str(checkpoint), "--cases", "2x8x12", "--decode", *flags)
    assert line["decode_tokens_per_s"] > 0


def test_our_tokens_are_what_float32_chooses(checkpoint: Path) -> None:
    commands = json.dumps({"do": "tokens", "case": "2x16x8", "seed": 1}) + "\n"
    flags = ("--worker", "--kv-cache-memory", "1000000")
    ready, answer = run("bench_engine.py", "--model", str(checkpoint), *flags, commands=commands)
    assert ready["engine"] == "wavetrain"
    (verdict,) = run("peers/float32_judge.py", "--model", str(checkpoint), commands=json.dumps(answer))
    assert verdict == {"first_choices": 1.0, "worst_gap": 0.0}
    answer["tokens"][0][3] ^= 1
    (verdict,) = run("peers/float32_judge.py", "--model", str(checkpoint), commands=json.dumps(answer))
    assert verdict["first_choices"] < 1.0


def test_bench_step_prints_every_part(checkpoint: Path) -> None:
    lines = run("bench_step.py", "--requests", "8", "--prompt-len", "16", "--steps", "20")
    parts = ["step", "schedule", "update", "encode", "inputs", "worker", "launch", "collect"]
    assert [line["part"] for line in lines] == parts
    assert all(line["median_us"] > 0 for line in lines)
