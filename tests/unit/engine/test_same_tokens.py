# SPDX-License-Identifier: Apache-2.0
"""What a request gets is its own, to the last bit: whoever is served beside it, and however it is cut up.

See docs/decisions/0004. In bfloat16 on the compiled kernels, with real steps of a real scheduler. Each kernel's own
share in it is in tests/unit/kernels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.compiled_kernels import are_compiled_kernels_to_be_had
from fakes.quantized_checkpoints import RECIPES, write_quantized
from fakes.real_core import RealCore
from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine.request import FinishReason, TokenLogprobs

pytestmark = pytest.mark.skipif(
    not are_compiled_kernels_to_be_had(), reason="no compiled kernels here, and PyTorch's results depend on the batch"
)

DEMO = Path(__file__).resolve().parents[3] / "model_repository" / "engine" / "1" / "demo"
NUM_OTHERS = 64
MAX_MODEL_LEN = 160
ALONE: dict[str, Any] = {"enable_prefix_caching": False, "cpu_threads": 1}
WAYS: dict[str, dict[str, Any]] = {
    "whole prompts": {"enable_prefix_caching": False},
    "two threads": {"cpu_threads": 2},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks beside decodes": {"max_num_batched_tokens": 96},
    "one step in flight": {"async_scheduling": True},
    "tiny pool": {"num_blocks": 64},
    "chunks, tiny pool, one step in flight": {
        "max_num_batched_tokens": 48,
        "num_blocks": 64,
        "async_scheduling": True,
    },
}
# What requests ask of the sampler, in turn.
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.8, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 2},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "logprobs": 0, "prompt_logprobs": 0},
    {"temperature": 0.7, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.3, "logprobs": 1},
]

# Tokens and log-probabilities of the output, and those of the prompt.
Answer = tuple[list[int], list[TokenLogprobs], list[list[TokenLogprobs]]]


@pytest.fixture(autouse=True)
def same_number_of_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


class Requests:
    """The same requests each time; the first are those that are also served alone."""

    def __init__(self, directory: Path, count: int, max_tokens: int) -> None:
        rng = random.Random(3)
        self.directory = directory
        self.prompts = [[rng.randrange(3, 500) for _ in range((100, 1, 33, 64, 17)[i % 5])] for i in range(count)]
        for prompt in self.prompts[5::5]:
            prompt[:48] = self.prompts[0][:48]
        self.max_tokens = max_tokens

    def core(self, **flags: Any) -> RealCore:
        usual = {"block_size": 16, "num_blocks": 1024, "max_num_seqs": 80, "max_num_batched_tokens": 2048}
        core = RealCore(self.directory, **usual | {"dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN} | flags)
        assert core.facts.kernels == "cpu"
        return core

    def add(self, core: RealCore, index: int) -> None:
        asked = {"seed": index, "max_tokens": self.max_tokens} | SAMPLING[index % len(SAMPLING)]
        core.add(f"r{index}", self.prompts[index], **asked)

    def answer(self, core: RealCore, index: int) -> Answer:
        name = f"r{index}"
        tokens = core.tokens(name)
        assert len(tokens) == self.max_tokens
        return tokens, core.logprobs(name), core.prompt_logprobs(name)

    def alone(self, count: int, **flags: Any) -> list[Answer]:
        core, answers = self.core(**ALONE, **flags), []
        for index in range(count):
            self.add(core, index)
            core.run()
            answers.append(self.answer(core, index))
        core.close()
        return answers

    def together(self, core: RealCore) -> list[Answer]:
        """All at once, those that are looked at in the midst of the others, and the last one later."""
        order = list(range(len(self.prompts)))
        random.Random(4).shuffle(order)
        for index in order[:-1]:
            self.add(core, index)
        for _ in range(3):
            core.step()
        self.add(core, order[-1])
        core.run()
        return [self.answer(core, index) for index in range(len(self.prompts))]


@pytest.fixture(scope="module")
def demo() -> Requests:
    return Requests(DEMO, NUM_OTHERS + 1, max_tokens=32)


@pytest.fixture(scope="module")
def demo_alone(demo: Requests) -> list[Answer]:
    return demo.alone(2 * len(SAMPLING))


@pytest.mark.parametrize("way", WAYS)
def test_among_64_others(demo: Requests, demo_alone: list[Answer], way: str) -> None:
    core = demo.core(**WAYS[way])
    assert demo.together(core)[: len(demo_alone)] == demo_alone
    assert (core.core.stats().num_preemptions > 0) == ("tiny pool" in way)
    core.close()


def test_from_the_prefix_cache(demo: Requests, demo_alone: list[Answer]) -> None:
    core = demo.core()
    demo.together(core)
    hits_before = core.core.stats().num_prefix_cache_hit_tokens
    assert demo.together(core)[: len(demo_alone)] == demo_alone
    assert core.core.stats().num_prefix_cache_hit_tokens > hits_before
    core.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_over_a_quantized_cache(kv_cache_dtype: str) -> None:
    """A token's codes depend on itself alone: not on its block, nor on what was written in one step with it."""
    requests = Requests(DEMO, 13, max_tokens=24)
    alone = requests.alone(4, kv_cache_dtype=kv_cache_dtype)
    for way in ("whole prompts", "chunks, tiny pool, one step in flight"):
        flags = WAYS[way] | ({"num_blocks": 40} if "tiny pool" in way else {})
        core = requests.core(kv_cache_dtype=kv_cache_dtype, **flags)
        assert requests.together(core)[:4] == alone
        assert (core.core.stats().num_preemptions > 0) == ("tiny pool" in way)
        core.close()
    core = requests.core(kv_cache_dtype=kv_cache_dtype)
    requests.together(core)
    hits_before = core.core.stats().num_prefix_cache_hit_tokens
    assert requests.together(core)[:4] == alone
    assert core.core.stats().num_prefix_cache_hit_tokens > hits_before
    core.close()


@pytest.mark.parametrize("activation_dtype", ["model", "int8"])
@pytest.mark.parametrize("name", ["w4a16-g32", "gptq-act-order"])
def test_of_weights_in_few_bits(checkpoints: TinyCheckpoints, tmp_path: Path, name: str, activation_dtype: str) -> None:
    """Inputs are rounded by what their own token needs."""
    source = checkpoints.get("llama", dtype=torch.bfloat16, with_tokenizer=False)
    quantized, _ = write_quantized(source, tmp_path, RECIPES[name])
    requests = Requests(quantized, 12, max_tokens=30)
    alone = requests.alone(6, activation_dtype=activation_dtype)
    for way in ("two threads", "chunks, tiny pool, one step in flight"):
        flags = WAYS[way] | ({"num_blocks": 40} if "tiny pool" in way else {})
        core = requests.core(activation_dtype=activation_dtype, **flags)
        assert requests.together(core)[:6] == alone
        core.close()


@pytest.mark.parametrize("family", ["llama-bias", "mistral", "qwen2-window", "qwen3", "gemma2", "mixtral", "qwen3-moe"])
def test_every_family(checkpoints: TinyCheckpoints, family: str) -> None:
    requests = Requests(checkpoints.get(family, dtype=torch.bfloat16, with_tokenizer=False), 12, max_tokens=30)
    alone = requests.alone(12)
    for way in ("whole prompts", "chunks, tiny pool, one step in flight"):
        flags = WAYS[way] | ({"num_blocks": 40} if "tiny pool" in way else {})
        core = requests.core(**flags)
        assert requests.together(core) == alone
        assert (core.core.stats().num_preemptions > 0) == ("tiny pool" in way)
        core.close()


@pytest.mark.parametrize("trial", range(12))
def test_comings_and_goings(checkpoints: TinyCheckpoints, trial: int) -> None:
    """Requests arrive and are cancelled at random, under random limits; nobody who stays notices."""
    rng = random.Random(trial)
    requests = Requests(checkpoints.get("mistral", dtype=torch.bfloat16, with_tokenizer=False), 12, max_tokens=30)
    alone = requests.alone(12)
    core = requests.core(
        max_num_batched_tokens=rng.choice([16, 33, 200]),
        max_num_seqs=rng.choice([3, 12]),
        num_blocks=rng.choice([22, 40, 200]),
        block_size=rng.choice([8, 16]),
        async_scheduling=rng.random() < 0.5,
        enable_prefix_caching=rng.random() < 0.7,
    )
    waiting = rng.sample(range(12), 12)
    leaving = set(waiting[:4])
    while waiting or core.core.has_work:
        if waiting and rng.random() < 0.3:
            requests.add(core, waiting.pop())
        if leaving and rng.random() < 0.05:
            core.core.cancel(f"r{leaving.pop()}")
        core.step()
    core.run()
    stayed = [index for index in range(12) if core.last(f"r{index}").finish_reason is FinishReason.LENGTH]
    assert len(stayed) >= 8
    assert [requests.answer(core, index) for index in stayed] == [alone[index] for index in stayed]
    core.close()
