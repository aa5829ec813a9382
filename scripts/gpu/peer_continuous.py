# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching on the same device, shape and requests, with weights drawn as ours are."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu.engine_parts import Plan
from gpu.rounds import significant


def measure_peer(
    model_dir: Path, plan: Plan, device: torch.device, dtype: torch.dtype, began: Callable[[float], object]
) -> dict[str, Any]:
    """Runs the plan's requests through `generate_batch`, after a short run that captures its graphs.

    `began` is told when, as `time.time()`: it cannot be stopped, and whoever ends it then knows how long it ran.

    Its pages, tokens a step, graphs and double buffering are what it chooses itself.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model_dir)
    with torch.device(device):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    model.generation_config.eos_token_id = None
    draw = random.Random(0)
    prompts = [[draw.randrange(3, config.vocab_size) for _ in range(plan.prompt_len)] for _ in range(plan.requests)]

    memory: dict[str, Any] = {}
    if device.type == "cpu":  # where it would take nearly all memory there is, and touch it
        names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        page = "page_size" if "page_size" in names else "block_size"  # as transformers 5.17 has it
        sizes: dict[str, Any] = {page: 16, "num_blocks": 16, "max_batch_tokens": 64}
        memory["continuous_batching_config"] = ContinuousBatchingConfig(**sizes)

    def generate(inputs: list[list[int]], num_tokens: int) -> int:
        # Only what differs from its defaults: greedy, and an end of text that is no token.
        asked = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=0
        )
        outputs = model.generate_batch(inputs=inputs, generation_config=asked, **memory)
        return sum(len(output.generated_tokens) for output in outputs.values())

    with torch.no_grad():  # its threads do without inference mode, and could not write to tensors made in it
        generate([prompt[: plan.prompt_len // 2] for prompt in prompts[:4]], min(plan.output_len, 8))
        began(time.time())
        started = time.perf_counter()
        num_tokens = generate(prompts, plan.output_len)
        seconds = time.perf_counter() - started
    if num_tokens != plan.requests * plan.output_len:
        raise RuntimeError(f"{num_tokens} tokens came, not {plan.requests * plan.output_len}")
    return {
        "seconds": significant(seconds),
        "output_tokens_per_s": significant(num_tokens / seconds),
        "attention": str(getattr(model.config, "_attn_implementation", "?")),
    }
