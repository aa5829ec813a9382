#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""In-flight batching against static batching: the same engine, kernels, model and requests.

    .venv/bin/python scripts/bench_batching.py --model model_repository/engine/1/demo

64 requests whose output lengths are log-uniform in [8, 256], as chat traffic is skewed, run through a batch of
--max-num-seqs. The static engine admits requests only into an empty batch, so a batch lasts as long as
its longest request. Rounds alternate; both must give the same tokens before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from wavetrain_engine import LLM, SamplingParams

NUM_REQUESTS = 64
PROMPT_LEN = 32
SHORTEST, LONGEST = 8, 256


def make_requests(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Draws prompts and output lengths from a fixed seed."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(8, vocab_size, (NUM_REQUESTS, PROMPT_LEN)).tolist()
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), NUM_REQUESTS)).astype(int)
    return prompts, [SamplingParams(temperature=0, max_tokens=int(n), ignore_eos=True) for n in lengths]


def timed(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[float, list[list[int]]]:
    """Runs all requests. Returns output tokens per second and the tokens."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(map(len, tokens)) / seconds, tokens


def main() -> None:
    """Prints one JSON line with both speeds, their ratio and its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("model_repository/engine/1/demo"))
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    flags = {"max_num_seqs": args.max_num_seqs, "enable_prefix_caching": False}
    with (
        LLM(model=str(args.model), **flags) as inflight,
        LLM(model=str(args.model), static_batching=True, **flags) as static,
    ):
        prompts, params = make_requests(min(inflight.facts.vocab_size, 4000))
        _, expected = timed(inflight, prompts, params)
        _, tokens = timed(static, prompts, params)
        differing = sum(a != b for a, b in zip(expected, tokens, strict=True))
        if any(len(a) != len(b) for a, b in zip(expected, tokens, strict=True)):
            raise SystemExit("the two engines gave different numbers of tokens; nothing was timed")
        rounds = [(timed(inflight, prompts, params)[0], timed(static, prompts, params)[0]) for _ in range(args.rounds)]
    ratios = [fast / slow for fast, slow in rounds]
    print(
        json.dumps(
            {
                "benchmark": "inflight_vs_static_batching",
                "model": args.model.name,
                "max_num_seqs": args.max_num_seqs,
                "inflight_tokens_per_s": round(statistics.median(fast for fast, _ in rounds), 1),
                "static_tokens_per_s": round(statistics.median(slow for _, slow in rounds), 1),
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "requests_with_other_tokens": differing,
            }
        )
    )


if __name__ == "__main__":
    main()
