# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of every format against transformers over the same weights, dequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fakes.compressed_layers import INPUT_SCALE
from fakes.quantized_checkpoints import RECIPES, Recipe, write_quantized
from fakes.tiny_checkpoints import TinyCheckpoints
from wavetrain_engine import LLM, SamplingParams

NUM_OUTPUT_TOKENS = 16
PROMPT_LENS = (3, 40)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # What other kernels make of a scheme is for their own tests.
    monkeypatch.setenv("WAVETRAIN_KERNELS", "reference")


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in PROMPT_LENS]


def round_inputs(x: Tensor, how: str) -> Tensor:
    """Rounds rows of inputs as the formats have it."""
    largest = 127.0 if how.startswith("int8") else 448.0
    size = 128 if how.endswith("-128") else x.shape[-1]
    wide = nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    scales = wide.abs().amax(-1, keepdim=True) / largest
    if how.endswith("-static"):
        scales = torch.full_like(scales, INPUT_SCALE)
    scaled = (wide / scales.where(scales > 0, 1.0)).clamp(-largest, largest)
    rounded = scaled.round() if how.startswith("int8") else scaled.to(torch.float8_e4m3fn).float()
    return (rounded * scales).flatten(-2)[..., : x.shape[-1]]


@torch.inference_mode()
def ask_transformers(directory: Path, recipe: Recipe) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the greedy tokens and the log-probabilities of the prompts' own tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    if recipe.inputs is not None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not any(part in name for part in recipe.skipped):
                module.register_forward_pre_hook(lambda _, args: (round_inputs(args[0], recipe.inputs or ""),))
    tokens, logprobs = [], []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, pad_token_id=2
        )
        tokens.append(output[0, len(prompt) :].tolist())
        scores = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
        logprobs.append(scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return tokens, logprobs


def ask_engine(directory: Path) -> tuple[list[list[int]], list[list[float]]]:
    """The same of ours."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, prompt_logprobs=1)
    with LLM(model=str(directory)) as llm:
        outputs = llm.generate(prompts(), params)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [entry[token].logprob for entry, token in zip((output.prompt_logprobs or [])[1:], prompt[1:], strict=True)]
        for output, prompt in zip(outputs, prompts(), strict=True)
    ]
    return tokens, logprobs


def assert_equal(quantized: Path, dequantized: Path, recipe: Recipe) -> None:
    want_tokens, want_logprobs = ask_transformers(dequantized, recipe)
    tokens, logprobs = ask_engine(quantized)
    # Where inputs are rounded, a sum in another order may round to the next step.
    tolerance = 2e-4 if recipe.inputs is None else 0.2
    for found, want in zip(logprobs, want_logprobs, strict=True):
        assert found == pytest.approx(want, abs=tolerance)
    if recipe.inputs is None:
        assert tokens == want_tokens


@pytest.mark.parametrize("name", RECIPES)
def test_every_format_equals_transformers(checkpoints: TinyCheckpoints, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    quantized, dequantized = write_quantized(checkpoints.get("llama"), tmp_path, recipe)
    assert_equal(quantized, dequantized, recipe)
