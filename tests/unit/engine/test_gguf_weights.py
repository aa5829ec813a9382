# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGUF's types against the gguf package's numbers; and tensors by a checkpoint's names and in its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file

from fakes.gguf_files import encode, random_blocks, write_gguf
from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.weights.checkpoint import Checkpoint
from wavetrain_engine.weights.gguf_blocks import repack
from wavetrain_engine.weights.gguf_reader import read_dense, read_quantized
from wavetrain_engine.weights.gguf_tensors import GgufTensor
from wavetrain_engine.weights.tensor_reader import TensorReader
from wavetrain_kernels.reference.quantized_linear import dequantize as widen

EXACT = {
    "Q4_0": ("int4", 32), "Q5_0": ("int8", 32), "Q5_1": ("int8", 32), "Q8_0": ("int8", 32), "Q2_K": ("int4", 16),
    "Q3_K": ("int4", 16), "Q5_K": ("int8", 32), "Q6_K": ("int8", 16), "IQ4_NL": ("int4", 32), "IQ4_XS": ("int4", 32),
    "MXFP4": ("int4", 32),
}  # fmt: skip
# Their zero moves by 8 steps, which rounds the minimum to float32 once more.
ROUNDED = {"Q4_1": ("int4", 32), "Q4_K": ("int4", 32)}
# Decoded by the package alone.
OTHERS = ("IQ3_S", "IQ2_XXS")
ROWS, COLUMNS = 6, 768


def theirs(blocks: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind]))


def write_blocks(path: Path, blocks: np.ndarray, kind: str, **values: Any) -> GgufTensor:
    path.write_bytes(blocks.tobytes())
    return GgufTensor(path, "t", kind, (len(blocks), COLUMNS), 0, blocks.nbytes, **values)


@pytest.mark.parametrize("kind", EXACT | ROUNDED)
def test_repacked_blocks_are_the_numbers_they_were(tmp_path: Path, kind: str) -> None:
    blocks = random_blocks(kind, ROWS, COLUMNS)
    weight = read_quantized(write_blocks(tmp_path / "x", blocks, kind))
    assert weight is not None
    assert (weight.scheme.values, weight.scheme.group_size) == (EXACT | ROUNDED)[kind]
    ours, expected = widen(weight), theirs(blocks, kind)
    if kind in EXACT:
        assert torch.equal(ours, expected)
        return
    assert weight.offsets is not None
    sizes = weight.offsets.abs().maximum(15 * weight.scales.abs()).repeat_interleave(weight.scheme.group_size, 1)
    assert ((ours - expected).abs() <= sizes * 2**-23).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*EXACT, *ROUNDED, *OTHERS])
def test_dense_numbers_are_the_packages(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(kind, ROWS, COLUMNS)
    out = torch.full((ROWS, COLUMNS), torch.nan, dtype=dtype)
    read_dense(write_blocks(tmp_path / "x", blocks, kind), out)
    assert torch.equal(out, theirs(blocks, kind).to(dtype))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_rows_of_heads_and_norms_are_put_back(tmp_path: Path, kind: str) -> None:
    values = torch.randn(ROWS * 4, COLUMNS, generator=torch.Generator().manual_seed(0))
    stored = values.view(6, 2, 2, COLUMNS).transpose(1, 2).reshape(-1, COLUMNS).numpy()
    raw = encode(stored, kind)
    blocks = raw.data.reshape(ROWS * 4, -1).view(np.uint8)
    want = torch.empty(ROWS * 4, COLUMNS)
    read_dense(write_blocks(tmp_path / "x", encode(values.numpy(), kind).data.view(np.uint8), kind), want)
    out = torch.empty_like(want)
    tensor = write_blocks(tmp_path / "y", blocks, kind, num_heads=6)
    read_dense(tensor, out)
    assert torch.equal(out, want)
    weight = read_quantized(tensor)
    assert (weight is None) == (kind != "Q8_0")
    if weight is not None:
        assert torch.equal(widen(weight), want)
    read_dense(write_blocks(tmp_path / "y", blocks, kind, added=1.0), out)
    assert torch.equal(out, theirs_of(stored, kind) - 1)


def theirs_of(values: np.ndarray, kind: str) -> torch.Tensor:
    raw = encode(values, kind)
    return torch.from_numpy(np.array(dequantize(raw.data, raw.kind)).reshape(values.shape))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "IQ3_S"])
@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused_by_name(tmp_path: Path, kind: str, scale: float) -> None:
    blocks = random_blocks(kind, ROWS, COLUMNS)
    start = 208 if kind == "Q6_K" else 0
    blocks[3, start : start + 2] = np.array([scale], np.float16).view(np.uint8)
    tensor = write_blocks(tmp_path / "x", blocks, kind)
    with pytest.raises(CheckpointError, match="tensor t has a scale that is no finite number"):
        read_dense(tensor, torch.empty(ROWS, COLUMNS))
    if kind != "IQ3_S":
        with pytest.raises(CheckpointError, match="tensor t has a scale that is no finite number"):
            read_quantized(tensor)


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    blocks = random_blocks("Q8_0", ROWS, COLUMNS)
    tensor = write_blocks(tmp_path / "x", blocks, "Q8_0")
    (tmp_path / "x").write_bytes(blocks.tobytes()[:-1])
    with pytest.raises(CheckpointError, match="x became shorter while it was read"):
        read_dense(tensor, torch.empty(ROWS, COLUMNS))
    (tmp_path / "x").unlink()
    with pytest.raises(CheckpointError, match="cannot read x"):
        read_quantized(tensor)


def test_unknown_types_are_not_repacked() -> None:
    assert repack(torch.zeros(1, 1, 110, dtype=torch.uint8), "IQ3_S") is None


def test_large_tensors_are_decoded_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavetrain_engine.weights.gguf_reader._VALUES_AT_ONCE", 2 * COLUMNS)
    blocks = random_blocks("Q6_K", ROWS + 1, COLUMNS)
    out = torch.empty(ROWS + 1, COLUMNS)
    read_dense(write_blocks(tmp_path / "x", blocks, "Q6_K"), out)
    assert torch.equal(out, theirs(blocks, "Q6_K"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("family", ["llama-bias", "mixtral", "qwen2", "qwen3-moe", "gemma2"])
def test_every_tensor_is_the_checkpoints(checkpoints: TinyCheckpoints, tmp_path: Path, family: str) -> None:
    directory = checkpoints.get(family)
    tensors = Checkpoint.open(write_gguf(directory, tmp_path / "x.gguf")).tensors
    expected = load_file(directory / "model.safetensors")
    assert set(tensors) == set(expected)
    reader = TensorReader()
    for name, want in expected.items():
        out = torch.empty_like(want)
        reader.read(tensors[name], out)
        # Gemma's norms had 1 added to them, and taken away: that rounds.
        torch.testing.assert_close(out, want, rtol=0, atol=2**-23 if tensors[name].added else 0, msg=name)
