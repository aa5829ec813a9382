# SPDX-License-Identifier: Apache-2.0
"""A recorded forward pass computes what the model does, to the last bit, for every family and any step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine.environment import Environment
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ModelConfig
from wavetrain_engine.models.registry import create_model
from wavetrain_engine.weights.loader import load_weights
from wavetrain_engine.worker.kv_cache import allocate_kv_caches, kv_cache_spec
from wavetrain_engine.worker.step_program import record_step
from wavetrain_kernels.errors import UnsupportedDevice
from wavetrain_kernels.ops import AttentionMetadata, WantedTokens, choose_kernels

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, CAPACITY = 16, 32, 48


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels() -> None:
    """The compiled kernels, as only they record."""
    try:
        choose_kernels("cpu", CPU, Environment.read().cache_dir / "kernels")
    except UnsupportedDevice as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


def load(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Model:
    config = ModelConfig.load(directory)
    model = create_model(config, dtype, CPU)
    load_weights(model, directory, config)
    return model


def record(model: Model, kv_cache_dtype: str = "auto"):
    caches = allocate_kv_caches(kv_cache_spec(model, kv_cache_dtype), NUM_BLOCKS, BLOCK_SIZE, CPU)
    return record_step(model, caches, capacity=CAPACITY, max_model_len=128, device=CPU), caches


def steps() -> list[tuple[torch.Tensor, AttentionMetadata]]:
    """A prompt in two chunks beside a decoding request, then decodes alone, in scattered blocks."""
    tables = torch.randperm(NUM_BLOCKS, dtype=torch.int32)[:16].view(2, 8)
    computed, result = [0, 0], []
    for query_lens in ([30, 5], [17, 1], [1, 1], [1, 0]):
        rows = [row for row in range(2) if query_lens[row]]
        positions = [computed[row] + i for row in rows for i in range(query_lens[row])]
        owners = [row for row in rows for _ in range(query_lens[row])]
        slots = [
            int(tables[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
            for row, position in zip(owners, positions, strict=True)
        ]
        computed = [computed[row] + query_lens[row] for row in range(2)]
        lens = [query_lens[row] for row in rows]
        seq_lens = [computed[row] for row in rows]
        metadata = AttentionMetadata.build(lens, seq_lens, tables[rows].contiguous(), torch.tensor(slots))
        result.append((torch.tensor(positions), metadata))
    return result


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_recording_computes_what_the_model_does(checkpoints: TinyCheckpoints, family: str, tied: bool) -> None:
    model = load(checkpoints.get(family, dtype=torch.bfloat16, tied=tied))
    program, recorded_caches = record(model)
    assert program is not None
    assert program.capacity == CAPACITY
    caches = allocate_kv_caches(model.kv_cache_spec(), NUM_BLOCKS, BLOCK_SIZE, CPU)
    for positions, metadata in steps():
        token_ids = torch.randint(3, 500, positions.shape)
        expected = model.forward(token_ids, positions, caches, metadata)
        assert torch.equal(program.run(token_ids, positions, metadata), expected)
    for recorded, cache in zip(recorded_caches, caches, strict=True):
        used = cache.key[1:] != 0  # block 0 was written to while it was recorded
        assert torch.equal(recorded.key[1:][used], cache.key[1:][used])


def wanted_tokens(metadata: AttentionMetadata, rows: list[int]) -> WantedTokens:
    """The last token of some rows of a step."""
    indices = metadata.query_start_loc[1:][rows].long() - 1
    lens = [metadata.host_seq_lens[row] for row in rows]
    tables, slots = metadata.block_tables.index_select(0, torch.tensor(rows).long()), metadata.slot_mapping[indices]
    return WantedTokens(indices, AttentionMetadata.build([1] * len(rows), lens, tables, slots))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3-moe"])
def test_wanted_tokens_come_out_as_among_all(checkpoints: TinyCheckpoints, family: str) -> None:
    model = load(checkpoints.get(family, dtype=torch.bfloat16))
    program, recorded_caches = record(model)
    assert program is not None
    all_caches, caches = (allocate_kv_caches(model.kv_cache_spec(), NUM_BLOCKS, BLOCK_SIZE, CPU) for _ in range(2))
    for positions, metadata in steps():
        token_ids = torch.randint(3, 500, positions.shape)
        all_hidden = model.forward(token_ids, positions, all_caches, metadata)
        for rows in ([*range(metadata.num_requests)], [0], []):
            wanted = wanted_tokens(metadata, rows)
            expected = all_hidden[wanted.indices]
            assert torch.equal(model.forward(token_ids, positions, caches, metadata, wanted), expected)
            assert torch.equal(program.run(token_ids, positions, metadata, wanted), expected)
    for recorded, cache, expected_cache in zip(recorded_caches, caches, all_caches, strict=True):
        assert torch.equal(cache.value, expected_cache.value)
        used = cache.value[1:] != 0
        assert torch.equal(recorded.value[1:][used], cache.value[1:][used])


@torch.inference_mode()
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_over_a_quantized_cache(checkpoints: TinyCheckpoints, family: str, kv_cache_dtype: str) -> None:
    model = load(checkpoints.get(family, dtype=torch.bfloat16))
    program, _ = record(model, kv_cache_dtype)
    assert program is not None
    caches = allocate_kv_caches(kv_cache_spec(model, kv_cache_dtype), NUM_BLOCKS, BLOCK_SIZE, CPU)
    for positions, metadata in steps():
        token_ids = torch.randint(3, 500, positions.shape)
        expected = model.forward(token_ids, positions, caches, metadata)
        assert torch.equal(program.run(token_ids, positions, metadata), expected)


@torch.inference_mode()
def test_a_dtype_of_the_reference_is_not_recorded(
    checkpoints: TinyCheckpoints, caplog: pytest.LogCaptureFixture
) -> None:
    assert record(load(checkpoints.get("llama"), torch.float32))[0] is None
    assert "layer by layer" not in caplog.text  # nothing is amiss: nothing to warn of


@torch.inference_mode()
def test_a_model_that_computes_beside_the_ops_is_found_out(
    checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(checkpoints.get("llama", dtype=torch.bfloat16))
    forward = model.embed_tokens.forward
    monkeypatch.setattr(model.embed_tokens, "forward", lambda ids: forward(ids) + 1)
    assert record(model)[0] is None
    assert "their recording computes something else" in caplog.text
