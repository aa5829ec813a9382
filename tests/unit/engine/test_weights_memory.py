# SPDX-License-Identifier: Apache-2.0
"""What loading needs: the weights and one module, nothing of the file once it is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fakes.tiny_checkpoints import make_tiny_checkpoint
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights
from wavetrain_engine.weights.safetensors_header import read_header
from wavetrain_engine.weights.tensor_reader import Pieces, Scratch, TensorReader

CPU = torch.device("cpu")

# Prints the bytes of the weights, and by how much loading them raised the most memory this process ever had.
LOAD = """
import re, sys
from pathlib import Path
import torch
from wavetrain_engine.environment import Environment
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights
from wavetrain_kernels.ops import choose_kernels

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

directory = Path(sys.argv[1])
config = ModelConfig.load(directory)
choose_kernels(sys.argv[2], torch.device("cpu"), Environment.read().cache_dir)
model = create_model(config, torch.bfloat16, torch.device("cpu"))
before = memory("VmRSS")
print(load_weights(model, directory, config), memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB in bfloat16, of which the largest module takes 4."""
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("large"),
        dtype=torch.bfloat16,
        with_tokenizer=False,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
    )


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_never_more_than_the_weights_and_one_module(large: Path, kernels: str) -> None:
    command = [sys.executable, "-c", LOAD, str(large), kernels]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    weight_bytes, more_bytes = map(int, done.stdout.split())
    assert weight_bytes > 90e6
    # Two copies, or the file mapped beside them, would be 2 and more.
    assert more_bytes < 1.4 * weight_bytes


def test_weights_stay_what_they_were_when_the_file_is_overwritten(tmp_path: Path) -> None:
    directory = make_tiny_checkpoint(tmp_path, dtype=torch.bfloat16, with_tokenizer=False)
    config = ModelConfig.load(directory)
    model = create_model(config, torch.bfloat16, "cpu")
    load_weights(model, directory, config)
    before = [parameter.clone() for parameter in model.parameters()]
    with (directory / "model.safetensors").open("r+b") as file:  # the same inode
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


class TestTensorReader:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_converts_on_the_way_where_it_must(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "none": torch.zeros(0, 4).to(dtype)}
        save_file(tensors, tmp_path / "t.safetensors")
        reader = TensorReader()
        for entry in read_header(tmp_path / "t.safetensors"):
            for wanted in (torch.float32, torch.bfloat16):
                out = torch.empty(entry.shape, dtype=wanted)
                reader.read(entry, out)
                assert torch.equal(out, tensors[entry.name].to(wanted))

    def test_fills_what_is_not_contiguous(self, tmp_path: Path) -> None:
        save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "t.safetensors")
        out = torch.zeros(2, 6)
        TensorReader().read(read_header(tmp_path / "t.safetensors")[0], out[:, ::2])
        assert out.tolist() == [[0, 0, 1, 0, 2, 0], [3, 0, 4, 0, 5, 0]]

    def test_a_file_that_shrank_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "t.safetensors"
        save_file({"a": torch.ones(4)}, path)
        entry = read_header(path)[0]
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"^t\.safetensors became shorter while it was read; load"):
            TensorReader().read(entry, torch.empty(4))
        path.unlink()
        with pytest.raises(CheckpointError, match=r"^cannot read t\.safetensors: No such file"):
            TensorReader().read(entry, torch.empty(4))

    @pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("num_bytes", [8, 64, 1 << 20])
    def test_a_device_gets_it_in_pieces(self, tmp_path: Path, num_bytes: int, wanted: torch.dtype) -> None:
        tensors = {"a": torch.randn(3, 5), "b": torch.randn(32).bfloat16(), "none": torch.zeros(0, 4)}
        save_file(tensors, tmp_path / "t.safetensors")
        pieces = Pieces(CPU, num_bytes=num_bytes)
        entries = read_header(tmp_path / "t.safetensors")
        for entry in entries:
            out = torch.empty(entry.shape, dtype=wanted)
            pieces.read(entry, out.view(-1))
            assert torch.equal(out, tensors[entry.name].to(wanted))
        path = tmp_path / "t.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
        last = max(entries, key=lambda entry: entry.begin + entry.num_bytes)
        with pytest.raises(CheckpointError, match=r"^t\.safetensors became shorter while it was read; load"):
            pieces.read(last, torch.empty(last.shape).view(-1))


def test_scratch_memory_is_used_again_until_it_is_let_go() -> None:
    scratch = Scratch(CPU)
    first = scratch.take((4, 4), torch.float32)
    second = scratch.take((2, 3), torch.bfloat16)
    assert second.data_ptr() == first.data_ptr()
    scratch.let_go(torch.ones(4))
    assert scratch.take((1,), torch.float32).data_ptr() == first.data_ptr()
    scratch.let_go(first)
    assert scratch.take((1,), torch.float32).data_ptr() != first.data_ptr()
