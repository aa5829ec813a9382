# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says it holds: as the gguf package reads it, and CheckpointError for whatever does not add up."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.gguf_files import encode, random_blocks, text, write_raw
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.block_types import BlockType, can_decode
from wavetrain_engine.gguf.byte_cursor import ByteCursor
from wavetrain_engine.gguf.gguf_file import GgufFile
from wavetrain_engine.gguf.metadata import Metadata
from wavetrain_engine.gguf.model_values import config_values, frequency_factors, generation_values
from wavetrain_engine.gguf.tokenizer import GgufTokenizer
from wavetrain_engine.gguf.vocabulary import chat_templates
from wavetrain_engine.model_location import ModelLocation
from wavetrain_engine.weights.gguf_reader import read_dense, read_quantized
from wavetrain_engine.weights.gguf_tensors import gguf_tensors

F32 = int(GGMLQuantizationType.F32)
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
VALUES: dict[str, Any] = {
    "general.alignment": 64, "llama.context_length": 128, "llama.embedding_length": 8, "llama.block_count": 1,
    "llama.feed_forward_length": 8, "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.chat_template": "{{ messages }}", "general.sampling.temp": 0.5,
}  # fmt: skip


def write_small(path: Path, tensors: dict[str, np.ndarray] | None = None, **values: Any) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in (VALUES | values).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ](key, value)
    default = {"token_embd.weight": np.ones((4, 8), np.float32), "rope_freqs.weight": np.ones(2, np.float32)}
    for name, tensor in (default if tensors is None else tensors).items():
        writer.add_tensor(name, tensor)
    if tensors is None:
        for name, kind in (("blk.0.attn_q.weight", "Q8_0"), ("blk.0.attn_v.weight", "IQ4_NL")):
            blocks = random_blocks(kind, 4, 32)
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.data_alignment = 64
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_as_the_package_reads_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.random((3, 5), np.float32), "b": rng.random(7, np.float32).astype(np.float16)}
    path = write_small(tmp_path / "x.gguf", tensors)
    ours, theirs = GgufFile.open(path), GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    content = path.read_bytes()
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert (stored.shape, stored.dtype) == (tensors[tensor.name].shape, tensor.tensor_type.name)
        assert content[stored.begin : stored.end] == tensors[tensor.name].tobytes()
    metadata = ours.metadata
    assert metadata.integer("general.alignment") == 64
    assert metadata.number("llama.attention.layer_norm_rms_epsilon") == 1e-5
    assert metadata.strings("tokenizer.ggml.tokens") == ["a", "b", "ab", "<e>"]
    assert metadata.integers("tokenizer.ggml.token_type") == [1, 1, 1, 3]


@given(value=st.floats(width=32, allow_nan=False))
def test_a_float32_is_the_shortest_decimal_that_is_it(value: float) -> None:
    raw = text("k") + struct.pack("<If", 6, value)
    read = Metadata.read(ByteCursor(io.BytesIO(raw), len(raw), "x"), 1, "x").number("k")
    assert np.float32(read) == np.float32(value)
    assert len(repr(read)) <= len(repr(float(str(np.float32(value)))))


def test_every_type_of_the_package_has_its_sizes() -> None:
    for kind, (num_values, num_bytes) in GGML_QUANT_SIZES.items():
        assert BlockType.of_id(int(kind)) == BlockType(kind.name, num_values, num_bytes) == BlockType.of_name(kind.name)
    assert can_decode("IQ2_XXS")
    assert not can_decode("Q8_K")


def a_tensor(name: str = "t", dimensions: tuple[int, ...] = (8, 2), kind: int = F32, offset: int = 0) -> Any:
    return (name, dimensions, kind, offset)


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "magic": (lambda path: write_raw(path, [], [], magic=b"GGML"), "no GGUF file"),
    "LFS": (lambda path: write_raw(path, [], [], magic=b"vers"), "git lfs pull"),
    "version 1": (lambda path: write_raw(path, [], [], version=1), "version 1; supported are 2, 3"),
    "big-endian": (lambda path: write_raw(path, [], [], version=3 << 24), "big-endian"),
    "counts": (lambda path: write_raw(path, [], [], counts=(2**60, 2**61)), "do not fit into its"),
    "string's length": (
        lambda path: write_raw(path, [("k", STRING, struct.pack("<Q", 2**63))], []),
        "metadata k needs 9223372036854775808 bytes",
    ),
    "array's length": (
        lambda path: write_raw(path, [("k", ARRAY, struct.pack("<IQ", UINT32, 2**60))], []),
        "metadata k needs",
    ),
    "strings' number": (
        lambda path: write_raw(path, [("k", ARRAY, struct.pack("<IQ", STRING, 2**60))], []),
        "metadata k needs",
    ),
    "array of arrays": (
        lambda path: write_raw(path, [("k", ARRAY, struct.pack("<IQ", ARRAY, 0))], []),
        "metadata k is an array of arrays",
    ),
    "type of a value": (lambda path: write_raw(path, [("k", 13, b"")], []), "metadata k is of unknown type 13"),
    "truth": (lambda path: write_raw(path, [("k", BOOL, b"\2")], []), "metadata k must be 0 or 1"),
    "key twice": (
        lambda path: write_raw(path, [("k", UINT32, bytes(4)), ("k", UINT32, bytes(4))], []),
        "key k occurs twice",
    ),
    "UTF-8": (lambda path: write_raw(path, [("k", STRING, struct.pack("<Q", 1) + b"\xff")], []), "k is not valid UTF"),
    "alignment 0": (lambda path: aligned(path, 0), "general.alignment: 0 is no power of two"),
    "alignment 24": (lambda path: aligned(path, 24), "general.alignment: 24 is no power of two"),
    "alignment, huge": (lambda path: aligned(path, 2**31), "no power of two"),
    "beyond the end": (lambda path: write_raw(path, [], [a_tensor()], bytes(63)), "tensor t needs bytes"),
    "offset beyond the end": (
        lambda path: write_raw(path, [], [a_tensor(offset=2**63 - 32)], bytes(64)),
        "tensor t begins at byte",
    ),
    "overlap": (
        lambda path: write_raw(path, [], [a_tensor("a"), a_tensor("b")], bytes(128)),
        "tensor b begins at byte 0 of the tensors instead of 64",
    ),
    "gap": (
        lambda path: write_raw(path, [], [a_tensor("a"), a_tensor("b", offset=96)], bytes(256)),
        "tensor b begins at byte 96",
    ),
    "unaligned": (lambda path: write_raw(path, [], [a_tensor(offset=8)], bytes(128)), "no multiple of 32"),
    "tensor twice": (
        lambda path: write_raw(path, [], [a_tensor(), a_tensor(offset=64)], bytes(128)),
        "tensor t occurs twice",
    ),
    "type of a tensor": (lambda path: write_raw(path, [], [a_tensor(kind=99)], bytes(64)), "tensor t is of unknown"),
    "part of a block": (lambda path: write_raw(path, [], [a_tensor(kind=2)], bytes(64)), "blocks of 32 values"),
    "no rows": (lambda path: write_raw(path, [], [a_tensor(dimensions=(8, 0))]), "cannot be of shape"),
    "product": (lambda path: write_raw(path, [], [a_tensor(dimensions=(2**33, 2**33))]), "cannot be of shape"),
    "dimensions": (lambda path: write_raw(path, [], [a_tensor(dimensions=(1,) * 5)]), "tensor t has 5 dimensions"),
    "escape": (lambda path: write_raw(path, [], [a_tensor("\x1b[2J", kind=99)]), r"tensor '\\x1b\[2J' is of unknown"),
    "two bytes": (lambda path: cut(path, 2), "its first word needs 4 bytes"),
    "half a head": (lambda path: cut(path, 20), "its counts needs 8 bytes"),
}


def cut(path: Path, num_bytes: int) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0)[: num_bytes - 4] if num_bytes > 4 else b"GG")
    return path


def aligned(path: Path, alignment: int) -> Path:
    return write_raw(path, [("general.alignment", UINT32, struct.pack("<I", alignment))], [])


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_add_up_is_refused(tmp_path: Path, what: str) -> None:
    make, message = BROKEN[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile.open(make(tmp_path / "x.gguf"))
    assert str(tmp_path) not in str(caught.value)
    assert str(caught.value).isprintable()


def read_everything(path: Path, content: bytes) -> None:
    """Reads a file as serving does: what gets through lies inside it."""
    path.write_bytes(content)
    file = attempt(GgufFile.open, path)
    if file is None:
        return
    assert all(0 < tensor.begin <= tensor.end <= len(content) for tensor in file.tensors.values())
    for read in (read_tensors, config_values, frequency_factors, generation_values):
        attempt(read, file)
    attempt(chat_templates, file.metadata)
    attempt(GgufTokenizer.read, file.metadata)


def read_tensors(file: GgufFile) -> None:
    for tensor in gguf_tensors(file).values():
        read_dense(tensor, torch.empty(tensor.shape))
        read_quantized(tensor)


def attempt(read: Callable[[Any], Any], source: object) -> Any:
    """Returns what was read; None where it was refused, in words that a terminal can show."""
    try:
        return read(source)
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()
    return None


fuzz = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_small(tmp_path_factory.mktemp("sound") / "x.gguf").read_bytes()


@fuzz
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    content = bytearray(sound)
    changes = st.lists(st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    for position, value in data.draw(changes):
        content[position] = value
    read_everything(tmp_path / "x.gguf", bytes(content))


@fuzz
@given(data=st.data())
def test_cut_and_extended_files(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(sound)))
    read_everything(tmp_path / "x.gguf", sound[:length] + data.draw(st.binary(max_size=16)))


@fuzz
@given(data=st.data())
def test_changed_numbers(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    """Lengths, counts, offsets and dimensions are 8 bytes anywhere: those a flipped byte does not reach."""
    position = data.draw(st.integers(0, len(sound) - 8))
    number = data.draw(st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, len(sound), len(sound) - 8]))
    read_everything(tmp_path / "x.gguf", sound[:position] + struct.pack("<Q", number) + sound[position + 8 :])


def test_a_split_file(tmp_path: Path) -> None:
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    split = {"split.count": 2, "split.tensors.count": 3}
    first, second = np.ones((2, 4), np.float32), np.full((2, 4), 2, np.float32)
    write_small(tmp_path / names[0], {"a": first}, **split, **{"split.no": 0})
    with pytest.raises(CheckpointError, match=f"1 of 2 parts are missing: {names[1]}"):
        GgufFile.open(tmp_path / names[0])
    write_small(tmp_path / names[1], {"b": second, "c": second}, **split, **{"split.no": 1})
    file = GgufFile.open(tmp_path / names[0])
    assert [(tensor.name, tensor.file.name) for tensor in file.tensors.values()] == [
        ("a", names[0]), ("b", names[1]), ("c", names[1]),
    ]  # fmt: skip
    assert ModelLocation.find(tmp_path).gguf == tmp_path / names[0]
    with pytest.raises(CheckpointError, match=f"a later part of a split file; give the first, {names[0]}"):
        GgufFile.open(tmp_path / names[1])
    write_small(tmp_path / names[1], {"a": second, "c": second}, **split, **{"split.no": 1})
    with pytest.raises(CheckpointError, match="tensor a is in"):
        GgufFile.open(tmp_path / names[0])
    write_small(tmp_path / names[1], {"b": second}, **split, **{"split.no": 1})
    with pytest.raises(CheckpointError, match="hold 2 tensors instead of 3"):
        GgufFile.open(tmp_path / names[0])
    write_small(tmp_path / names[1], {"b": second}, **split, **{"split.no": 0})
    with pytest.raises(CheckpointError, match="is not part 2 of 2"):
        GgufFile.open(tmp_path / names[0])
    (tmp_path / names[0]).rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="by which the others are found"):
        GgufFile.open(tmp_path / "renamed.gguf")


def test_where_a_model_is(tmp_path: Path) -> None:
    path = write_small(tmp_path / "a.gguf")
    assert ModelLocation.find(path) == ModelLocation(path, path)
    assert ModelLocation.find(tmp_path) == ModelLocation(tmp_path, path)
    write_small(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files \(a.gguf, b.gguf\); give the path"):
        ModelLocation.find(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert ModelLocation.find(tmp_path) == ModelLocation(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' is not a directory; give"):
        ModelLocation.find(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint directory"):
        ModelLocation.find("x" * 5000)


def test_types_without_a_decoder_are_named(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_K
    path = write_raw(tmp_path / "x.gguf", [], [a_tensor(dimensions=(256, 1), kind=int(kind))], bytes(4096))
    with pytest.raises(CheckpointError, match="tensor t is of type Q8_K, which is not supported"):
        gguf_tensors(GgufFile.open(path))
    assert encode(np.ones((1, 32), np.float32), "Q8_0").kind is GGMLQuantizationType.Q8_0
