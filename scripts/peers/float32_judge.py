# SPDX-License-Identifier: Apache-2.0
"""Judges greedy tokens by transformers' logits in float32: reads {"prompts": ..., "tokens": ...}, prints one JSON line.

Engines that compute in bfloat16 may choose another token than float32 would where two are nearly equal, and their
texts part there. So every token is judged after the tokens the engine itself chose before it: `first_choices` is the
share that float32 would have chosen too, `worst_gap` how far the logit of the worst one lies below the best, in
standard deviations of the logits.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def judge(model: Any, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, float]:
    """Returns the share of first choices and the worst gap over all requests."""
    num_first, num_tokens, worst = 0, 0, 0.0
    for prompt, output in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt + output])
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        gaps = logits.max(dim=1).values - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        num_first += int((gaps == 0).sum())
        num_tokens += len(output)
        worst = max(worst, float((gaps / logits.std(dim=1)).max()))
    return {"first_choices": round(num_first / num_tokens, 4), "worst_gap": round(worst, 4)}


def main() -> None:
    """Judges each line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for line in sys.stdin:
        said = json.loads(line)
        print(json.dumps(judge(model, said["prompts"], said["tokens"])), flush=True)


if __name__ == "__main__":
    main()
