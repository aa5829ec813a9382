# SPDX-License-Identifier: Apache-2.0
"""No kernel is compiled while requests wait: the size of a step makes no variant, and a counter sees what does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton import knobs

from wavetrain_kernels.gpu import launch

SCRIPT = Path(__file__).with_name("launch_variants.py")


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, list[str]]]:
    """What the script finds, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_script_sees_what_must_not_be(variants):
    (keys,) = variants.pop("a_kernel_as_it_must_not_be").values()
    assert len(keys) == 3  # 1, multiples of 16, all others


def test_the_size_of_a_step_makes_no_variant(variants):
    many = {
        (scenario, kernel): keys for scenario in variants for kernel, keys in variants[scenario].items() if keys[1:]
    }
    assert many == {}


def test_every_scenario_launches_a_kernel(variants):
    assert [scenario for scenario, kernels in variants.items() if not kernels] == []


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> launch._CompileCounter:
    """A counter of this test alone."""
    made = launch._CompileCounter()
    monkeypatch.setattr(launch, "_COUNTER", made)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    return made


def test_what_is_compiled_is_counted_and_named(counter):
    launch.count_compilations()
    launch.count_compilations()
    assert launch.compile_count() == 0
    for name in ("first", "second"):
        assert knobs.runtime.jit_post_compile_hook(repr=name, key="", fn=None) is None
    assert launch.compile_count() == 2
    assert launch.compiled_since(1) == ["second"]


def test_a_hook_that_was_there_is_called_too(counter, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: told.append(facts["repr"]))
    launch.count_compilations()
    knobs.runtime.jit_post_compile_hook(repr="first")
    assert told == ["first"]
    assert launch.compile_count() == 1
