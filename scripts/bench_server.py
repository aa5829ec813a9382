#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The served engine against the bare one: tokens/s, TTFT and ITL through the real Triton server.

    .venv/bin/python scripts/make_random_model.py --shape 129m --out /tmp/m-129m
    .venv/bin/python scripts/bench_server.py --model /tmp/m-129m

The offline engine runs in this process, the server beside it on the same cores, with the client; rounds alternate
and only one of them works at a time. Every stream must bring every token before its time counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench_target import started_target, where_measured
from wavetrain_client import AsyncClient
from wavetrain_engine import LLM, SamplingParams


@dataclass(frozen=True)
class Round:
    """One timed run of all streams."""

    tokens_per_s: float
    ttft_ms: list[float]
    itl_ms: list[float]


async def run_server(url: str, model: str, prompts: list[str], num_out: int) -> Round:
    """Streams all prompts at once through the server."""
    ttft, gaps = [], []

    async def one(client: AsyncClient, prompt: str) -> int:
        start = last = time.perf_counter()
        count = 0
        async for chunk in client.stream(prompt, model=model, max_tokens=num_out, temperature=0, ignore_eos=True):
            now = time.perf_counter()
            (gaps if count else ttft).append((now - (last if count else start)) * 1e3)
            count += chunk.num_output_tokens or 0
            last = now
        return count

    async with AsyncClient(url) as client:
        start = time.perf_counter()
        counts = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
        seconds = time.perf_counter() - start
    if any(count != num_out for count in counts):
        raise SystemExit(f"a stream lost tokens: {counts}")
    return Round(sum(counts) / seconds, ttft, gaps)


def run_offline(llm: LLM, prompts: list[str], num_out: int) -> float:
    """Runs all prompts at once in the bare engine. Returns output tokens per second."""
    params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def make_prompts(llm: LLM, count: int, num_in: int) -> list[str]:
    """Random text of about num_in tokens each, different for each stream."""
    rng = np.random.default_rng(0)
    high = min(llm.facts.vocab_size, 8000)
    return [llm.tokenizer.decode(rng.integers(300, high, num_in).tolist()) for _ in range(count)]


def main() -> None:
    """Prints one JSON line per number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--triton-model", default="llm", choices=("llm", "ensemble"))
    parser.add_argument("--streams", default="16,32")
    parser.add_argument("--num-in", type=int, default=64)
    parser.add_argument("--num-out", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with (
        LLM(model=str(args.model), enable_prefix_caching=False) as llm,
        started_target(str(args.model), ["--no-enable-prefix-caching"]) as server,
    ):
        for streams in map(int, args.streams.split(",")):
            prompts = make_prompts(llm, streams, args.num_in)
            asyncio.run(run_server(server.url, args.triton_model, prompts, args.num_out))
            run_offline(llm, prompts, args.num_out)
            offline, served = [], []
            for _ in range(args.rounds):
                offline.append(run_offline(llm, prompts, args.num_out))
                served.append(asyncio.run(run_server(server.url, args.triton_model, prompts, args.num_out)))
            print(json.dumps(summary(args, streams, offline, served)), flush=True)


def summary(args: argparse.Namespace, streams: int, offline: list[float], served: list[Round]) -> dict[str, object]:
    """Medians and spreads over the rounds."""
    ratios = [one.tokens_per_s / bare for one, bare in zip(served, offline, strict=True)]
    ttft = [value for one in served for value in one.ttft_ms]
    itl = [value for one in served for value in one.itl_ms]
    return {
        "benchmark": "server_vs_offline",
        "model": args.model.name,
        "triton_model": args.triton_model,
        "case": f"{streams}x{args.num_in}x{args.num_out}",
        "offline_tokens_per_s": round(statistics.median(offline), 1),
        "server_tokens_per_s": round(statistics.median(one.tokens_per_s for one in served), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ttft_ms_p50": round(float(np.percentile(ttft, 50)), 1),
        "ttft_ms_p99": round(float(np.percentile(ttft, 99)), 1),
        "itl_ms_p50": round(float(np.percentile(itl, 50)), 2),
        "itl_ms_p99": round(float(np.percentile(itl, 99)), 2),
        **where_measured(),
    }


if __name__ == "__main__":
    main()
