#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""In-flight batching against static batching: the same engine, kernels, model and requests.

    .venv/bin/python scripts/bench_batching.py --model model_repository/engine/1/demo

64 requests, all there from the start, with output lengths from 8 to 256, run through a batch of --max-num-seqs seats.
In flight, a request that ends makes room for the next at once. Made to batch statically, as a padded `generate` does,
the same engine takes the requests in groups of that many seats; every row of a group is computed until its longest
request is done, and what was not asked for is thrown away. The ways alternate, every round draws other lengths, and
both ways must give every token that was asked for.

How much there is to gain is a matter of the lengths: --lengths exponential (each token is the last with the same
chance, mean 64), log-uniform, or uniform, which no traffic is. `ratio_of_steps` is what counting steps promises.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench_target import where_measured
from wavetrain_engine import LLM, SamplingParams

NUM_REQUESTS = 64
PROMPT_LEN = 32
SHORTEST, MEAN, LONGEST = 8, 64, 256


def draw_lengths(kind: str, rng: np.random.Generator) -> list[int]:
    """Draws each request's number of output tokens."""
    if kind == "exponential":
        lengths = SHORTEST + rng.exponential(MEAN - SHORTEST, NUM_REQUESTS)
    elif kind == "log-uniform":
        lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), NUM_REQUESTS))
    else:
        lengths = rng.uniform(SHORTEST, LONGEST, NUM_REQUESTS)
    return np.clip(lengths, SHORTEST, LONGEST).astype(int).tolist()


def ratio_of_steps(lengths: list[int], seats: int) -> float:
    """Steps that static batching takes over steps in flight, where only decoding counts."""
    static = sum(max(lengths[start : start + seats]) for start in range(0, len(lengths), seats))
    ends = [0] * seats
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return static / max(ends)


def make_requests(vocab_size: int, kind: str, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Draws prompts and output lengths."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(8, vocab_size, (NUM_REQUESTS, PROMPT_LEN)).tolist()
    lengths = draw_lengths(kind, rng)
    return prompts, [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


def run_inflight(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """All requests at once. Returns each one's tokens."""
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def run_static(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], seats: int) -> list[list[int]]:
    """Group after group, each as long as its longest request. Returns the tokens that were asked for."""
    tokens: list[list[int]] = []
    for start in range(0, len(prompts), seats):
        lengths = [one.max_tokens or 0 for one in params[start : start + seats]]
        longest = SamplingParams(temperature=0, max_tokens=max(lengths), ignore_eos=True)
        outputs = llm.generate(prompts[start : start + seats], longest)
        tokens += [list(o.outputs[0].token_ids)[:n] for o, n in zip(outputs, lengths, strict=True)]
    return tokens


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Returns the tokens per second that were asked for, and the tokens."""
    start = time.perf_counter()
    tokens = run()
    return sum(map(len, tokens)) / (time.perf_counter() - start), tokens


def check(inflight: list[list[int]], static: list[list[int]], params: list[SamplingParams]) -> None:
    """Ends the run where a request did not get as many tokens as it asked for: then no speed means anything."""
    asked = [one.max_tokens for one in params]
    if [len(one) for one in inflight] != asked or [len(one) for one in static] != asked:
        raise SystemExit("a request got another number of tokens than it asked for")


def main() -> None:
    """Prints one JSON line with both speeds, their ratio and its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("model_repository/engine/1/demo"))
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--lengths", default="exponential", choices=("exponential", "log-uniform", "uniform"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with LLM(model=str(args.model), max_num_seqs=args.max_num_seqs, enable_prefix_caching=False) as llm:
        rounds: list[tuple[float, float]] = []
        promised: list[float] = []
        differing = 0
        for seed in range(args.rounds + 1):  # the first is a warm-up
            prompts, params = make_requests(min(llm.facts.vocab_size, 4000), args.lengths, seed)
            inflight_speed, expected = timed(partial(run_inflight, llm, prompts, params))
            static_speed, tokens = timed(partial(run_static, llm, prompts, params, args.max_num_seqs))
            check(expected, tokens, params)
            differing += sum(a != b for a, b in zip(expected, tokens, strict=True))
            rounds.append((inflight_speed, static_speed))
            promised.append(ratio_of_steps([one.max_tokens or 0 for one in params], args.max_num_seqs))
    rounds = rounds[1:]
    ratios = [fast / slow for fast, slow in rounds]
    print(
        json.dumps(
            {
                "benchmark": "inflight_vs_static_batching",
                "model": args.model.name,
                "lengths": args.lengths,
                "max_num_seqs": args.max_num_seqs,
                "inflight_tokens_per_s": round(statistics.median(fast for fast, _ in rounds), 1),
                "static_tokens_per_s": round(statistics.median(slow for _, slow in rounds), 1),
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "ratio_of_steps_median": round(statistics.median(promised[1:]), 2),
                "requests_with_other_tokens": differing,
                **where_measured(),
            }
        )
    )


if __name__ == "__main__":
    main()
