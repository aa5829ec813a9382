# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate` with a static batch on the CPU, as a benchmark program.

.venv/bin/python scripts/peers/peer_transformers.py --model models/129m
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from engine_program import add_arguments, run
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Transformers:
    """A model in bfloat16; all prompts of a call have one length, so nothing is padded."""

    name = "transformers"

    def __init__(self, model: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        """See Engine."""
        return self._generate(prompts, num_out)[:, len(prompts[0]) :].tolist()

    def token_times(self, prompts: list[list[int]], num_out: int) -> list[list[float]]:
        """See Engine."""
        watch = _Watch()
        self._generate(prompts, num_out, stopping_criteria=StoppingCriteriaList([watch]))
        return [watch.times for _ in prompts]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], num_out: int, **options: Any) -> torch.Tensor:
        tokens = torch.tensor(prompts)
        return self._model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_out,
            min_new_tokens=num_out,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


class _Watch(StoppingCriteria):
    """Notes when it is asked, which is once a token, and never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: Any) -> Any:
        del scores, kwargs
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main() -> None:
    """Parses the arguments and measures, or works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(lambda args: Transformers(args.model), parser.parse_args())


if __name__ == "__main__":
    main()
