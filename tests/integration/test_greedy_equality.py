# SPDX-License-Identifier: Apache-2.0
"""The engine against transformers: the same greedy tokens, whatever the scheduler does to the requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes.tiny_checkpoints import TINY_FAMILIES, TinyCheckpoints
from wavetrain_engine import LLM, SamplingParams

NUM_OUTPUT_TOKENS = 64
# Two prompts share their first 48 tokens, so that the prefix cache has something to find.
PROMPT_LENS = (3, 17, 40, 60, 55, 33)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "chunks-of-16": {"max_num_batched_tokens": 16},
    "chunks-of-16-no-prefix-cache": {"max_num_batched_tokens": 16, "enable_prefix_caching": False},
    "tiny-pool": {"num_blocks": 20, "max_model_len": 128},
    "tiny-pool-no-prefix-cache": {"num_blocks": 20, "max_model_len": 128, "enable_prefix_caching": False},
    "one-step-in-flight": {"async_scheduling": True},
    "one-step-in-flight-tiny-pool": {"async_scheduling": True, "num_blocks": 20, "max_model_len": 128},
}


@dataclass(frozen=True)
class Oracle:
    """What transformers says of one checkpoint."""

    directory: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    prompt_logprobs: list[list[float]]


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in PROMPT_LENS]
    prompts[4][:48] = prompts[3][:48]
    return prompts


@torch.inference_mode()
def ask_transformers(directory: Path) -> Oracle:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    prompts, outputs, logprobs = make_prompts(), [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, pad_token_id=2
        )
        outputs.append(tokens[0, len(prompt) :].tolist())
        scores = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
        logprobs.append(scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return Oracle(directory, prompts, outputs, logprobs)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module", params=sorted(TINY_FAMILIES))
def oracle(request: pytest.FixtureRequest, checkpoints: TinyCheckpoints) -> Oracle:
    return ask_transformers(checkpoints.get(request.param))


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_equal_transformers(oracle: Oracle, setting: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    with LLM(model=str(oracle.directory), **SETTINGS[setting]) as llm:
        for _ in range(2):  # the second time, the prefix cache holds what the first left
            outputs = llm.generate(oracle.prompts, params)
            assert [list(output.outputs[0].token_ids) for output in outputs] == oracle.outputs
        stats = llm.read_stats()
    if "tiny-pool" in setting:
        assert stats.num_preemptions > 0
    if "no-prefix-cache" in setting:
        assert stats.num_prefix_cache_hit_tokens == 0
    elif "tiny-pool" not in setting:
        assert stats.num_prefix_cache_hit_tokens > 0
    assert stats.num_blocks_used == 0


@pytest.mark.parametrize("setting", ["default", "chunks-of-16"])
def test_prompt_logprobs_equal_transformers(oracle: Oracle, setting: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    with LLM(model=str(oracle.directory), **SETTINGS[setting]) as llm:
        outputs = llm.generate(oracle.prompts, params)
    for output, prompt, expected in zip(outputs, oracle.prompts, oracle.prompt_logprobs, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        assert found == pytest.approx(expected, abs=1e-4)
