# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a weight file holds: tensors that lie inside it, or CheckpointError; never anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.weights.checkpoint import Checkpoint
from wavetrain_engine.weights.safetensors_header import read_header

SOUND = save({"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})
HEADER_END = 8 + int.from_bytes(SOUND[:8], "little")

fuzz = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_everything(path: Path, content: bytes) -> None:
    """Reads the file as the loader does; everything that gets past the header check must be readable."""
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError as error:
        str(error).encode("utf-8")
        return
    data_begin = 8 + int.from_bytes(content[:8], "little")
    assert all(data_begin <= entry.begin <= entry.end <= len(content) for entry in entries)
    assert set(Checkpoint.open(path.parent).tensors) == {entry.name for entry in entries}


@fuzz
@given(changes=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_header_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(SOUND)
    for position, value in changes:
        content[position] = value
    read_everything(tmp_path / "model.safetensors", bytes(content))


@fuzz
@given(length=st.integers(0, len(SOUND)), tail=st.binary(max_size=16))
def test_cut_and_extended_files(tmp_path: Path, length: int, tail: bytes) -> None:
    read_everything(tmp_path / "model.safetensors", SOUND[:length] + tail)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@fuzz
@given(header=json_values, data=st.binary(max_size=32))
def test_any_json_as_header(tmp_path: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    read_everything(tmp_path / "model.safetensors", len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4611686018427387904], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"2," * 1000 + b'2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
        b"\xff",
        b"7",
    ],
)
def test_unsound_headers_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(CheckpointError, match=r"^model\.safetensors is truncated or not a safetensors file"):
        read_header(path)


def test_a_sound_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    with safe_open(path, framework="pt") as reader:
        for entry in read_header(path):
            view = reader.get_slice(entry.name)
            assert (list(entry.shape), entry.dtype) == (view.get_shape(), view.get_dtype())
            raw = reader.get_tensor(entry.name).view(torch.uint8).numpy().tobytes()
            assert SOUND[entry.begin : entry.end] == raw
