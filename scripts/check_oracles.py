#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made by others' tools, served by ours: the same log-probabilities? See `scripts/quantization_oracles`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from wavetrain_engine import LLM, SamplingParams

ANSWER = "oracle.json"
# Log-probabilities may differ by so much. Where inputs are rounded to 8 bits, tools differ in what is the largest (127
# or 127.5), and each rounding that goes the other way moves the rest: about as far as rounding itself does.
EXACT, ROUNDED = 1e-4, 0.25
ROUNDED_INPUTS = ("w8a8", "mixed")


@dataclass(frozen=True)
class Result:
    """Of one checkpoint: how far the log-probabilities of its prompts' tokens are apart."""

    name: str
    tool: str
    largest: float
    mean: float
    allowed: float

    @property
    def is_equal(self) -> bool:
        return self.largest <= self.allowed


def check(directory: Path) -> Result:
    """Serves the checkpoint and compares it with what its own tool says."""
    answer = json.loads((directory / ANSWER).read_text(encoding="utf-8"))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    with LLM(model=str(directory), dtype="float32", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(answer["prompts"], params)
    differences = [
        abs((entry or {})[token].logprob - wanted)
        for prompt, output, row in zip(answer["prompts"], outputs, answer["logprobs"], strict=True)
        for entry, token, wanted in zip((output.prompt_logprobs or [])[1:], prompt[1:], row, strict=True)
    ]
    is_rounded = any(word in directory.name for word in ROUNDED_INPUTS)
    mean = sum(differences) / len(differences)
    return Result(directory.name, answer["tool"], max(differences), mean, ROUNDED if is_rounded else EXACT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with one folder for each checkpoint")
    parser.add_argument("names", nargs="*", help="of checkpoints; none: all")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folders = sorted(path.parent for path in arguments.folder.glob(f"*/{ANSWER}"))
    num_wrong = 0
    print(f"{'checkpoint':<20} {'made and answered by':<30} {'largest':>10} {'mean':>10}")
    for folder in folders:
        if arguments.names and folder.name not in arguments.names:
            continue
        result = check(folder)
        num_wrong += not result.is_equal
        verdict = "" if result.is_equal else f"  more than {result.allowed}"
        print(f"{result.name:<20} {result.tool:<30} {result.largest:>10.2e} {result.mean:>10.2e}{verdict}")
    return 1 if num_wrong or not folders else 0


if __name__ == "__main__":
    sys.exit(main())
