# SPDX-License-Identifier: Apache-2.0
"""Which machines get the GPU's kernel set, and what its launchers stand on: memory, measured configurations, traits."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from triton import knobs

from wavetrain_kernels import ops
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.gpu import kernels, launch, tuning, workspace
from wavetrain_kernels.ops import dispatch
from wavetrain_kernels.reference.kernels import REFERENCE

CUDA = torch.device("cuda")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an H200, as far as the loader can see; a process that has not chosen yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(launch, "_COUNTER", launch._CompileCounter())
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # a set directory is passed on to processes by it
    monkeypatch.setitem(knobs.cache.__dict__, "dir", "")
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.usefixtures("pretended_gpu")
def test_a_gpu_gets_its_kernels(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert ops.choose_kernels("auto", CUDA, tmp_path) is kernels.GPU
    assert ops.kernel_set(CUDA) == "gpu"
    assert knobs.cache.dir == str(tmp_path / "triton")
    assert isinstance(knobs.runtime.jit_post_compile_hook, launch._CompileCounter)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert [record.getMessage() for record in caplog.records] == ["GPU kernels for NVIDIA H200, compute capability 9.0"]


@pytest.mark.usefixtures("pretended_gpu")
def test_an_old_gpu_gets_the_reference_and_is_told_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    with caplog.at_level(logging.WARNING):
        assert ops.choose_kernels("auto", CUDA, tmp_path) is REFERENCE
    assert [record.getMessage() for record in caplog.records] == [
        "gpu kernels cannot be had, slower ones answer: the gpu kernels need compute capability 7.0 or newer, "
        "NVIDIA H200 has 6.1"
    ]
    with pytest.raises(UnsupportedDevice, match=r"need compute capability 7\.0 or newer, NVIDIA H200 has 6\.1"):
        ops.choose_kernels("gpu", CUDA, tmp_path)


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedDevice, match="need an NVIDIA GPU, and torch sees none"):
        ops.choose_kernels("gpu", CUDA, tmp_path)
    with pytest.raises(
        UnsupportedDevice, match="no cpu kernels for device 'cuda'; available there: auto, gpu, reference"
    ):
        ops.choose_kernels("cpu", CUDA, tmp_path)


def _forget(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    loaded = [name for name in sys.modules if name.startswith("wavetrain_kernels.gpu")]
    for package, _, attribute in (name.rpartition(".") for name in loaded):
        # An import sets the package's attribute too: other tests are to find the module they had.
        monkeypatch.setattr(sys.modules[package], attribute, getattr(sys.modules[package], attribute))
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)


def test_without_triton(tmp_path, monkeypatch):
    _forget(monkeypatch, "triton")
    with pytest.raises(UnsupportedDevice, match="need triton, which is not installed: pip install triton"):
        ops.choose_kernels("gpu", CUDA, tmp_path)


def test_another_missing_module_is_an_error_of_ours(tmp_path, monkeypatch):
    _forget(monkeypatch, "wavetrain_kernels.gpu.norm")
    with pytest.raises(ModuleNotFoundError):
        ops.choose_kernels("gpu", CUDA, tmp_path)


def test_an_empty_grid_is_not_launched():
    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((*grid, *args, *options.values()))

    launch.launch(Kernel(), (3, 0), 1)
    launch.launch(Kernel(), (3, 2), 7, num_warps=4)
    assert launched == [(3, 2, 7, 4)]


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_powers_of_two(size, expected):
    assert launch.next_power_of_2(size) == expected


def test_the_interpreter_pretends_an_h200():
    assert launch.device_traits(torch.device("cpu")) is launch.H200


def test_a_workspace_is_kept_and_grows(monkeypatch, device):
    monkeypatch.setattr(workspace, "_BUFFERS", workspace._Buffers())
    first = workspace.workspace("parts", (4, 8), torch.float32, device)
    assert first.shape == (4, 8)
    assert first.is_contiguous()
    assert not first.any()
    first.fill_(3.0)
    smaller = workspace.workspace("parts", (2, 3), torch.float32, device)
    assert smaller.data_ptr() == first.data_ptr()
    assert (smaller == 3.0).all()
    assert workspace.workspace("other", (2, 3), torch.float32, device).data_ptr() != first.data_ptr()
    larger = workspace.workspace("parts", (4, 9), torch.float32, device)
    assert larger.data_ptr() != first.data_ptr()
    assert not larger.any()
    assert (first == 3.0).all()  # a captured graph may hold its address
    assert workspace.workspace("parts", (4, 8), torch.int64, device).dtype == torch.int64
    assert workspace.workspace("nothing", (0, 8), torch.float32, device).shape == (0, 8)


@pytest.fixture
def tuned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the files of measured configurations are looked for, for a machine with an H200."""
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(tuning, "_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    tuning._table.cache_clear()
    yield tmp_path / "tuned"
    tuning._table.cache_clear()


def test_measured_configurations(tuned_files):
    table = {"decode": {"128,8,bf16": {"num_warps": 8}}}
    (tuned_files / "nvidia-h200.json").write_text(json.dumps({"device": "NVIDIA H200", "kernels": table}), "utf-8")
    assert tuning.tuned("decode", (128, 8, "bf16")) == {"num_warps": 8}
    assert tuning.tuned("decode", "128,8,bf16", CUDA) == {"num_warps": 8}
    assert tuning.tuned("decode", (64, 8, "bf16")) is None
    assert tuning.tuned("prefill", (128, 8, "bf16")) is None
    assert tuning.tuned("decode", (128, 8, "bf16"), torch.device("cpu")) is None


def test_a_device_that_nobody_measured(tuned_files):
    assert tuning.tuned("decode", 1) is None


def test_files_are_named_after_their_device():
    assert tuning.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert tuning.file_name("NVIDIA A100-SXM4-80GB ") == "nvidia-a100-sxm4-80gb.json"


def test_committed_configurations_can_be_read():
    folder = resources.files("wavetrain_kernels").joinpath("tuned")
    assert folder.is_dir()
    for file in folder.iterdir():
        if file.name.endswith(".json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            assert tuning.file_name(content["device"]) == file.name
            assert all(isinstance(entry, dict) for entries in content["kernels"].values() for entry in entries.values())
