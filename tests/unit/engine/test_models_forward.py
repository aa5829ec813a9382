# SPDX-License-Identifier: Apache-2.0
"""Every family's hidden states and logits against transformers, through a paged cache in scrambled order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes.tiny_checkpoints import TINY_FAMILIES, VOCAB_SIZE, TinyCheckpoints
from wavetrain_engine.errors import ConfigError
from wavetrain_engine.layers.attention import KVCache
from wavetrain_engine.models.model import Model
from wavetrain_engine.models.model_config import ARCHITECTURES, ModelConfig
from wavetrain_engine.models.registry import MODEL_CLASSES, create_model, resolve_dtype
from wavetrain_engine.weights.loader import load_weights
from wavetrain_kernels.ops import AttentionMetadata, dispatch

BLOCK_SIZE = 16
NUM_BLOCKS = 24


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@dataclass
class PagedRun:
    """A model, its KV caches, and the blocks each request got, in no order at all."""

    model: Model
    caches: list[KVCache]
    tables: torch.Tensor  # [requests, blocks]

    @classmethod
    def start(cls, model: Model, num_requests: int) -> PagedRun:
        spec = model.kv_cache_spec()
        shape = spec.shape(NUM_BLOCKS, BLOCK_SIZE)
        # What was in a block before must never matter.
        caches = [
            KVCache(*(torch.full(shape, float("nan"), dtype=spec.dtype) for _ in range(2)))
            for _ in range(model.config.num_layers)
        ]
        generator = torch.Generator().manual_seed(3)
        scrambled = torch.randperm(NUM_BLOCKS, generator=generator).int()
        return cls(model, caches, scrambled.reshape(num_requests, -1))

    @torch.inference_mode()
    def step(self, rows: list[tuple[int, list[int], int]]) -> list[torch.Tensor]:
        """Runs rows of (request, token ids, tokens already computed); returns the logits of each row."""
        positions = [torch.arange(start, start + len(ids)) for _, ids, start in rows]
        tables = torch.stack([self.tables[request] for request, _, _ in rows])
        slots = [tables[row, p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE for row, p in enumerate(positions)]
        query_lens = [len(ids) for _, ids, _ in rows]
        metadata = AttentionMetadata.build(
            query_lens, [start + len(ids) for _, ids, start in rows], tables, torch.cat(slots)
        )
        input_ids = torch.tensor([token for _, ids, _ in rows for token in ids])
        hidden = self.model(input_ids, torch.cat(positions), self.caches, metadata)
        return list(self.model.compute_logits(hidden).split(query_lens))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Model:
    config = ModelConfig.load(directory)
    model = create_model(config, dtype, "cpu")
    load_weights(model, directory, config)
    return model


@torch.inference_mode()
def reference_logits(directory: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    return model(torch.tensor([ids])).logits[0]


def random_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def chunked_logits(model: Model, ids: list[int], chunks: tuple[int, ...]) -> torch.Tensor:
    run, outputs, start = PagedRun.start(model, 1), [], 0
    for length in chunks:
        outputs += run.step([(0, ids[start : start + length], start)])
        start += length
    return torch.cat(outputs)


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_logits_equal_transformers_over_chunks(checkpoints: TinyCheckpoints, family: str) -> None:
    directory, ids = checkpoints.get(family), random_ids(100)
    # A chunk that ends within a block, a single token, and one that crosses blocks and windows.
    logits = chunked_logits(load(directory), ids, (37, 1, 62))
    torch.testing.assert_close(logits, reference_logits(directory, ids), atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="scripts/gpu_check compares tokens on the device")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's sigmoid of -100
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # its loops' bounds
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "mixtral", "qwen3-moe"])
def test_the_gpus_kernels_make_a_model(checkpoints: TinyCheckpoints, family: str, monkeypatch) -> None:
    gpu = pytest.importorskip("wavetrain_kernels.gpu.kernels", reason="needs triton, to interpret the kernels")
    monkeypatch.setattr(dispatch, "_CHOSEN", {"cpu": gpu.GPU})
    directory, ids = checkpoints.get(family), random_ids(21)
    logits = chunked_logits(load(directory), ids, (18, 1, 2))
    torch.testing.assert_close(logits, reference_logits(directory, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_equal_transformers(checkpoints: TinyCheckpoints, family: str, tied: bool) -> None:
    directory, ids = checkpoints.get(family, tied=tied, sharded=True), random_ids(20)
    logits = chunked_logits(load(directory), ids, (20,))
    torch.testing.assert_close(logits, reference_logits(directory, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_requests_of_one_step_do_not_disturb_each_other(checkpoints: TinyCheckpoints, family: str) -> None:
    directory = checkpoints.get(family)
    first, second, third = random_ids(70, 1), random_ids(45, 2), random_ids(5, 3)
    run = PagedRun.start(load(directory), 3)
    run.step([(0, first[:69], 0)])
    run.step([(1, second[:30], 0)])
    # One decode, one later chunk and one whole prompt together.
    logits = run.step([(1, second[30:], 30), (0, first[69:], 69), (2, third, 0)])
    for got, ids in zip(logits, (second, first, third), strict=True):
        want = reference_logits(directory, ids)[-len(got) :]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral", "qwen3-moe"])
def test_bfloat16_stays_close_to_transformers(checkpoints: TinyCheckpoints, family: str) -> None:
    directory, ids = checkpoints.get(family, dtype=torch.bfloat16), random_ids(40)
    model = load(directory, torch.bfloat16)
    logits = chunked_logits(model, ids, (40,))
    assert logits.dtype == torch.float32
    exact = reference_logits(directory, ids)
    rounded = reference_logits(directory, ids, torch.bfloat16)
    # No further from the exact result than transformers in bfloat16 is, within noise.
    assert (logits - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


def test_weights_are_converted_to_the_models_dtype(checkpoints: TinyCheckpoints) -> None:
    directory, ids = checkpoints.get("llama", dtype=torch.bfloat16), random_ids(10)
    logits = chunked_logits(load(directory, torch.float32), ids, (10,))
    torch.testing.assert_close(logits, reference_logits(directory, ids), atol=1e-4, rtol=0)


def test_dynamic_rope_for_long_requests_is_that_of_a_prompt_of_max_model_len(checkpoints: TinyCheckpoints) -> None:
    directory, ids = checkpoints.get("llama-rope-dynamic"), random_ids(200)
    config = ModelConfig.load(directory)
    model = create_model(config, torch.float32, "cpu", max_model_len=200)
    load_weights(model, directory, config)
    logits = chunked_logits(model, ids, (150, 50))
    torch.testing.assert_close(logits, reference_logits(directory, ids), atol=1e-4, rtol=0)


def test_max_model_len_beyond_the_positions_is_refused(checkpoints: TinyCheckpoints) -> None:
    config = ModelConfig.load(checkpoints.get("llama"))
    with pytest.raises(ConfigError, match="max_model_len 513 is longer than the 512 tokens"):
        create_model(config, torch.float32, "cpu", max_model_len=513)


def test_a_model_takes_no_memory_before_its_weights(checkpoints: TinyCheckpoints) -> None:
    config = ModelConfig.load(checkpoints.get("llama"))
    model = create_model(config, torch.float32, "cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_cache_spec_counts_the_bytes_of_a_block(checkpoints: TinyCheckpoints) -> None:
    model = create_model(ModelConfig.load(checkpoints.get("llama")), torch.bfloat16, "cpu")
    spec = model.kv_cache_spec()
    assert spec.shape(10, 16) == (10, 2, 16, 16)
    assert spec.bytes_per_block(16) == 2 * 2 * (2 * 16 * 16) * 2  # layers × (K, V) × one block's elements × bytes


def test_every_architecture_of_the_parser_has_a_model() -> None:
    assert set(MODEL_CLASSES) == set(ARCHITECTURES)


def test_auto_dtype_is_the_checkpoints_own(checkpoints: TinyCheckpoints) -> None:
    config = ModelConfig.load(checkpoints.get("llama", dtype=torch.bfloat16))
    assert resolve_dtype(config) is torch.bfloat16
    assert resolve_dtype(config, "float32") is torch.float32
