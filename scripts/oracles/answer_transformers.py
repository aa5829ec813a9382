# SPDX-License-Identifier: Apache-2.0
"""Asks transformers, with compressed-tensors, of checkpoints: `answer_transformers.py OUT CHECKPOINT ...`.

Runs in the environment of llm-compressor. OUT gets a folder of links to each checkpoint's files, and the answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_model import write_answer
from transformers import AutoModelForCausalLM


def main() -> None:
    out = Path(sys.argv[1])
    for source in map(Path, sys.argv[2:]):
        target = out / source.name
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).symlink_to(file.resolve())
        write_answer(
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), target, tool="wavetrain, transformers"
        )


if __name__ == "__main__":
    main()
