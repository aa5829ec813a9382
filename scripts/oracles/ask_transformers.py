# SPDX-License-Identifier: Apache-2.0
"""What transformers says of checkpoints that `wavetrain quantize` wrote: `ask_transformers.py DIR...`.

Runs in an environment with transformers and compressed-tensors. `scripts/check_oracles.py` compares with ours.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tiny_model import write_answer
from transformers import AutoModelForCausalLM


def ask(directory: Path) -> None:
    """Loads a checkpoint, without the scheme of its KV cache: transformers would round keys and values."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(directory, Path(temporary) / "checkpoint"))
        values = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        values["quantization_config"]["kv_cache_scheme"] = None
        (copy / "config.json").write_text(json.dumps(values), encoding="utf-8")
        model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
        write_answer(model, directory, tool="wavetrain quantize, transformers")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        ask(Path(name))
