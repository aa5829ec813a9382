#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What prefix affinity brings: prompt tokens found in the prefix cache, and the time to the first token.

    .venv/bin/python scripts/bench_prefix_affinity.py

Starts two servers of the demo model, or of --model-dir, and sends a trace through the gateway's routing: --num-shared
prompts that many requests begin with, in random order, each request with some words of its own behind them. Three ways
take turns, each round under a salt of its own, so that none finds what another left:

- `random`: each request goes to a replica drawn at random;
- `load`: power of two choices by outstanding tokens, without affinity;
- `affinity`: the gateway's routing as it is.

--num-blocks sizes each server's KV cache: where one holds all shared prompts, every way finds them in the end; where
it holds somewhat more than half, as by default, only they do that divide the prompts among the replicas. One JSON line
for each way: the hit rate over all prompt tokens, its least and most over the rounds, TTFT, tokens/s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bench_target import make_prompts, percentile, started_target, where_measured
from wavetrain_client import GenerationRequest
from wavetrain_gateway.routing.routed_upstream import RoutedUpstream, make_upstream
from wavetrain_gateway.routing.settings import RoutingSettings
from wavetrain_gateway.upstream import Job, UpstreamStream

MODEL = "m"
WAYS = ("random", "load", "affinity")
# Of the demo model's tokenizer, about, for these words.
_TOKENS_PER_WORD = 1

Open = Callable[[Job], UpstreamStream]


@dataclass(frozen=True)
class TraceResult:
    """What one run of a trace came to."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    seconds: float
    ttft_ms: Sequence[float]

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in a prefix cache."""
        return self.num_cached_tokens / self.num_prompt_tokens


def make_trace(*, num_shared: int, num_requests: int, shared_words: int, own_words: int, seed: int = 0) -> list[str]:
    """Returns prompts, each of which begins with one of the shared ones, in random order."""
    rng = random.Random(seed)
    shared = make_prompts(num_shared, shared_words)
    own = make_prompts(num_shared + num_requests, own_words)[num_shared:]
    return [f"{rng.choice(shared)} {words}" for words in own]


async def run_trace(
    open_job: Open, trace: Sequence[str], *, concurrency: int, max_tokens: int, salt: str
) -> TraceResult:
    """Sends the trace in order, so many requests at a time."""
    waiting = iter(trace)
    prompt_tokens, cached_tokens, output_tokens = 0, 0, 0
    ttft_ms: list[float] = []

    async def work() -> None:
        nonlocal prompt_tokens, cached_tokens, output_tokens
        for prompt in waiting:
            began_s = time.perf_counter()
            has_begun = False
            async with open_job(_job(prompt, max_tokens, salt)) as stream:
                async for chunk in stream:
                    if not has_begun:
                        ttft_ms.append((time.perf_counter() - began_s) * 1000)
                        has_begun = True
                    output_tokens += chunk.num_output_tokens or 0
                    if chunk.perf_metrics is not None and chunk.perf_metrics.num_cached_tokens is not None:
                        cached_tokens += chunk.perf_metrics.num_cached_tokens
                        prompt_tokens += chunk.num_input_tokens or 0

    began_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    if not prompt_tokens:
        raise SystemExit("the servers do not tell how many prompt tokens they found in their prefix caches")
    return TraceResult(prompt_tokens, cached_tokens, output_tokens, time.perf_counter() - began_s, ttft_ms)


def open_by(way: str, urls: Sequence[str], rng: random.Random) -> tuple[Open, list[RoutedUpstream]]:
    """How one of the ways opens a job, and the upstreams it uses, which are to be started and closed."""
    if way == "random":
        single = [make_upstream(RoutingSettings(), upstreams=[url], model=MODEL) for url in urls]
        return lambda job: rng.choice(single).open(job), single
    balance = {} if way == "affinity" else {"max_index_chunks": 0}
    upstream = make_upstream(RoutingSettings.model_validate({"balance": balance}), upstreams=urls, model=MODEL)
    return upstream.open, [upstream]


def _job(prompt: str, max_tokens: int, salt: str) -> Job:
    options = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0, "return_perf_metrics": True}
    return Job(
        model=MODEL,
        generation=GenerationRequest(prompt=prompt, options=options, cache_salt=salt),
        num_prompt_tokens=len(prompt) // 4,
        max_output_tokens=max_tokens,
        affinity=prompt,
    )


async def measure(urls: Sequence[str], args: argparse.Namespace) -> None:
    """Lets the ways take turns, and prints a line for each."""
    rng = random.Random(1)
    results: dict[str, list[TraceResult]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        trace = make_trace(
            num_shared=args.num_shared,
            num_requests=args.num_requests,
            shared_words=args.shared_words,
            own_words=args.own_words,
            seed=number,
        )
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            open_job, upstreams = open_by(way, urls, rng)
            for upstream in upstreams:
                await upstream.start()
            result = await run_trace(
                open_job, trace, concurrency=args.concurrency, max_tokens=args.max_tokens, salt=f"{way}{number}"
            )
            for upstream in upstreams:
                await upstream.close()
            results[way].append(result)
            print(f"round {number}, {way}: {result.hit_rate:.3f}, {result.seconds:.1f} s", file=sys.stderr)
    for way, runs in results.items():
        rates = [run.hit_rate for run in runs]
        line = {
            "way": way,
            "hit_rate": round(statistics.median(rates), 3),
            "hit_rate_low_high": [round(min(rates), 3), round(max(rates), 3)],
            "ttft_ms_p50": round(statistics.median(percentile(run.ttft_ms, 50) for run in runs), 1),
            "ttft_ms_p95": round(statistics.median(percentile(run.ttft_ms, 95) for run in runs), 1),
            "output_tokens_per_s": round(statistics.median(run.num_output_tokens / run.seconds for run in runs), 1),
            "prompt_tokens": runs[0].num_prompt_tokens,
            "trace": f"{args.num_requests} requests, {args.num_shared} shared prompts, {args.concurrency} at a time",
            "num_blocks": args.num_blocks,
        }
        print(json.dumps(line | where_measured()), flush=True)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", help="checkpoint to serve; the demo model without it")
    parser.add_argument("--num-shared", type=int, default=20, help="shared prompts (%(default)s)")
    parser.add_argument("--num-requests", type=int, default=200, help="requests of a trace (%(default)s)")
    parser.add_argument("--shared-words", type=int, default=150, help="words of a shared prompt (%(default)s)")
    parser.add_argument("--own-words", type=int, default=15, help="words of each request's own (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=8, help="output tokens of a request (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-blocks", type=int, help="KV blocks of a server (default: for 0.6 of the shared prompts)")
    args = parser.parse_args()
    if args.num_blocks is None:
        words = 0.6 * args.num_shared * args.shared_words + args.concurrency * (args.shared_words + args.own_words)
        args.num_blocks = int(words * _TOKENS_PER_WORD / 16)
    # Both servers share the machine's cores: with a thread for each core, each waits for the other's.
    flags = ["--num-blocks", str(args.num_blocks), "--cpu-threads", str(max(1, (os.cpu_count() or 1) // 2))]
    with ExitStack() as stack:
        urls = [stack.enter_context(started_target(args.model_dir, flags)).url for _ in range(2)]
        asyncio.run(measure(urls, args))


if __name__ == "__main__":
    main()
