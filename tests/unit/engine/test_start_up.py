# SPDX-License-Identifier: Apache-2.0
"""What a process imports before its first token: nothing heavy before it is needed, nothing that never is."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest

from wavetrain_engine.worker_import import import_worker


def imported_by(code: str) -> set[str]:
    """Modules of a fresh interpreter after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"]
    return set(json.loads(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout))


@pytest.mark.parametrize("code", ["from wavetrain_engine import LLM, AsyncLLM", "import wavetrain_engine.core_process"])
def test_nothing_heavy_before_a_model_is_loaded(code: str) -> None:
    assert not imported_by(code) & {"torch", "transformers", "rich", "numpy"}


def test_the_worker_takes_of_torch_what_torch_takes_itself() -> None:
    plain = imported_by("import torch, numpy")
    more = imported_by("from wavetrain_engine.worker_import import import_worker\nimport_worker()") - plain
    assert {name.partition(".")[0] for name in more} >= {"wavetrain_engine", "wavetrain_kernels"}
    heavy = ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "triton", "transformers")
    assert [name for name in more if name.startswith(heavy)] == []


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(is_enabled: bool) -> None:
    was_enabled = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        import_worker()
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
