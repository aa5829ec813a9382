# SPDX-License-Identifier: Apache-2.0
"""The engine's greedy tokens on the device, judged by transformers in float32; and that nothing is compiled meanwhile.

Each token is judged after the engine's own tokens before it: its logit against the best one. In float32 that leaves
room for ties alone, in bfloat16 for the rounding of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fakes.tiny_checkpoints import TINY_FAMILIES, make_tiny_checkpoint  # pyright: ignore[reportMissingImports]
from wavetrain_engine import LLM, SamplingParams

NUM_OUTPUT_TOKENS = 48
# Two prompts share their first 48 tokens, so that the prefix cache has something to find.
PROMPT_LENS = (3, 17, 40, 60, 55, 33, 100)
# How far below the best a token may be, in standard deviations of the logits.
MAX_GAPS = {"float32": 1e-3, "bfloat16": 0.15}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "eager": {"enforce_eager": True},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "preempted": {"num_blocks": 24, "max_model_len": 160},
    "one step at a time": {"async_scheduling": False},
}
# Few graphs to capture and little memory to fill, as many engines are started.
_SMALL = {"max_num_seqs": 16, "num_blocks": 512}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_right: bool
    detail: str


def greedy_checks(folder: Path, device: torch.device, *, is_dry_run: bool) -> Iterator[Check]:
    """Yields the checks of every family, in both types on a GPU."""
    for family in ["llama"] if is_dry_run else sorted(TINY_FAMILIES):
        for dtype in ("float32",) if is_dry_run else ("float32", "bfloat16"):
            name = f"{family}, {dtype}"
            try:
                yield from _family_checks(name, family, dtype, folder / f"{family}-{dtype}", device)
            except Exception as error:
                yield Check(name, is_right=False, detail=f"{type(error).__name__}: {error}"[:300])


def _family_checks(name: str, family: str, dtype: str, folder: Path, device: torch.device) -> Iterator[Check]:
    options: dict[str, Any] = {}
    if device.type == "cuda":  # heads of a size that models have
        options = {"hidden_size": 256, "intermediate_size": 384}
        options |= {"head_dim": 64} if "head_dim" in TINY_FAMILIES[family].options else {}
    make_tiny_checkpoint(folder, family, dtype=getattr(torch, dtype), **options)
    prompts = make_prompts()
    tokens: dict[str, list[list[int]]] = {}
    settings = SETTINGS if family in ("llama", "gemma2") else {"default": {}}
    for setting, flags in settings.items():
        found, compiled = _run(folder, prompts, {**_SMALL, "device": device.type, **flags})
        tokens[setting] = found
        if compiled:
            yield Check(f"{name}, {setting}: no compilation", is_right=False, detail=", ".join(compiled)[:200])
    judge = _Judge(folder, device)
    for setting, found in tokens.items():
        yield judge.check(f"{name}, {setting}", prompts, found, MAX_GAPS[dtype])
    if "eager" in tokens and dtype == "float32":
        same = sum(left == right for left, right in zip(tokens["eager"], tokens["default"], strict=True))
        detail = f"{same} of {len(prompts)} answers are the same"
        yield Check(f"{name}: graphs and eager agree", is_right=same == len(prompts), detail=detail)


def make_prompts() -> list[list[int]]:
    """Returns prompts of all lengths, always the same."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in PROMPT_LENS]
    prompts[4][:48] = prompts[3][:48]
    return prompts


def _run(folder: Path, prompts: list[list[int]], flags: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
    """Returns the tokens of two runs, which must agree, and which kernels were made ready after the engine was."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    with LLM(model=str(folder), skip_tokenizer_init=True, **flags) as llm:
        before = _compile_count(flags["device"])
        runs = [llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params) for _ in range(2)]
        compiled = _compiled_since(flags["device"], before)
    listed = [[list(output.outputs[0].token_ids) for output in run] for run in runs]
    if any(len(tokens) != NUM_OUTPUT_TOKENS for run in listed for tokens in run):
        raise RuntimeError("an answer is not as long as it was asked to be")
    return listed[0], compiled


def _compile_count(device: str) -> int:
    if device == "cpu":
        return 0
    from wavetrain_kernels.gpu.launch import compile_count

    return compile_count()


def _compiled_since(device: str, count: int) -> list[str]:
    if device == "cpu":
        return []
    from wavetrain_kernels.gpu.launch import compiled_since

    return compiled_since(count)


class _Judge:
    """transformers in float32, with the weights that the engine had."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self._model = model.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def check(self, name: str, prompts: Sequence[list[int]], answers: Sequence[list[int]], max_gap: float) -> Check:
        """Judges answers."""
        worst, num_first, num_tokens = 0.0, 0, 0
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer], device=self._device)
            logits = self._model(ids).logits[0, len(prompt) - 1 : -1].double()
            chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            gaps = (logits.amax(dim=-1) - chosen) / logits.std(dim=-1)
            worst = max(worst, float(gaps.max()))
            num_first += int((gaps == 0).sum())
            num_tokens += len(answer)
        detail = f"{num_first} of {num_tokens} are float32's first choice, worst gap {worst:.2g}"
        return Check(name, is_right=worst <= max_gap, detail=detail)
