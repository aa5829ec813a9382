# SPDX-License-Identifier: Apache-2.0
"""What --kv-cache-dtype does to an engine: how much fits, how near the answers stay, what is refused.

That tokens do not depend on the batch is in test_same_tokens.py, that recorded steps agree in test_step_program.py.
"""

from __future__ import annotations

import math
from http import cookies
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.real_core import RealCore
from fakes.tiny_checkpoints import make_tiny_checkpoint
from wavetrain_engine import LLM, ConfigError, SamplingParams, Tokenizer
from wavetrain_engine.layers.attention import KVCacheSpec

DEMO = Path(__file__).resolve().parents[3] / "model_repository" / "engine" / "1" / "demo"
NUM_WINDOWS, WINDOW = 6, 512


@pytest.fixture(scope="module")
def text() -> list[int]:
    """A module that the demo model was not trained on, as tokens."""
    source = Path(cookies.__file__).read_text(encoding="utf-8")
    return Tokenizer.load(DEMO).encode(source)[: NUM_WINDOWS * WINDOW]


def perplexity(tokens: list[int], **flags: Any) -> float:
    """Per token, over windows of the text; every context is read from the cache."""
    core = RealCore(DEMO, dtype="bfloat16", block_size=16, num_blocks=240, max_num_batched_tokens=1024, **flags)
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    for number, window in enumerate(windows):
        core.add(f"r{number}", window, prompt_logprobs=0, max_tokens=1)
    core.run()
    entries = [entry for number in range(len(windows)) for part in core.prompt_logprobs(f"r{number}") for entry in part]
    core.close()
    logprobs = [entry.logprobs[0] for entry in entries if entry.logprobs]
    assert len(logprobs) >= len(tokens) - 2 * len(windows)
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.fixture(scope="module")
def unquantized(text: list[int]) -> float:
    return perplexity(text)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_perplexity_is_within_one_percent(text: list[int], unquantized: float, kv_cache_dtype: str) -> None:
    assert unquantized < 30
    quantized = perplexity(text, kv_cache_dtype=kv_cache_dtype)
    assert quantized != unquantized
    assert quantized == pytest.approx(unquantized, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "shown"), [("int8", "int8"), ("fp8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3")], ids=["int8", "fp8", "e4m3"]
)
def test_about_twice_the_blocks_in_the_same_memory(dtype: str, shown: str) -> None:
    room = {"dtype": "bfloat16", "num_blocks": None, "kv_cache_memory": 16 << 20, "max_model_len": 512}
    plain, quantized = RealCore(DEMO, **room), RealCore(DEMO, kv_cache_dtype=dtype, **room)
    plain.close()
    quantized.close()
    assert (plain.facts.kv_cache_dtype, quantized.facts.kv_cache_dtype) == ("bfloat16", shown)
    assert 1.93 < quantized.facts.num_blocks / plain.facts.num_blocks < 2
    assert quantized.facts.kv_cache_bytes <= 16 << 20


@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 1.939), (128, 1.969), (256, 1.984)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_block_counts_its_scales(dtype: torch.dtype, head_dim: int, ratio: float) -> None:
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": head_dim}
    plain = KVCacheSpec(dtype=torch.bfloat16, **sizes).bytes_per_block(16)
    quantized = KVCacheSpec(dtype=dtype, **sizes).bytes_per_block(16)
    assert quantized == 3 * 16 * 2 * 2 * (head_dim + 2)
    assert plain / quantized == pytest.approx(ratio, abs=1e-3)


def test_the_offline_engine_takes_the_flag() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    texts: dict[str, str] = {}
    for kv_cache_dtype in ("auto", "bfloat16", "int8", "fp8"):
        with LLM(model=str(DEMO), device="cpu", num_blocks=64, kv_cache_dtype=kv_cache_dtype) as llm:
            (result,) = llm.generate(["def __init__(self"], greedy)
            texts[kv_cache_dtype] = result.outputs[0].text
    assert texts["bfloat16"] == texts["auto"]
    assert all(text.startswith(texts["auto"][:8]) for text in texts.values())


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_a_cache_that_is_not_quantized_is_of_the_models_dtype(tmp_path: Path, dtype: str, kv_cache_dtype: str) -> None:
    directory = make_tiny_checkpoint(tmp_path, with_tokenizer=False)
    message = f"--kv-cache-dtype {kv_cache_dtype}: the model computes in {dtype}, .* use fp8 or int8"
    with pytest.raises(ConfigError, match=message):
        RealCore(directory, dtype=dtype, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize("name", ["fp8_e5m2", "int4", "FP8", ""])
def test_unknown_names_are_told_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cache.kv_cache_dtype: expected one of auto, .*, fp8, fp8_e4m3, int8, got"):
        RealCore(tmp_path, kv_cache_dtype=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_models_in_other_dtypes(tmp_path: Path, dtype: str, kv_cache_dtype: str) -> None:
    """Where the reference attends."""
    core = RealCore(make_tiny_checkpoint(tmp_path, with_tokenizer=False), dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    assert len(core.run_one(list(range(3, 40)))) == 12
    core.close()
