#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the prefix cache brings where prompts share a prefix, and what it costs where none do.

    .venv/bin/python scripts/make_random_model.py --shape 129m --out /tmp/m-129m
    .venv/bin/python scripts/bench_prefix_cache.py --model /tmp/m-129m

Two JSON lines, each with the median of the rounds and the least and most:

- `no_hits`: the speed of an engine with the cache on over that of one with it off, each in a process of its own, which
  take turns at --case NxIxO: N requests at once with I prompt tokens and O output tokens, no two prompts alike. Both
  have a KV cache of twice what a case needs, and have used all of it before anything is timed: a cache that keeps what
  it has goes on to memory that nothing was ever in, and the first touch of a page costs a virtual machine dearly. That
  happens once for each page; --num-blocks with a large number shows it.
- `hits`: the time to the first token of a prompt of --prompt-len tokens whose first --cached (0.95) are in the cache,
  over that of the same prompt under another salt, which finds nothing. Both take turns in one engine.

Before anything is timed, both engines, and both ways of the second part, must give the same tokens. Where bfloat16
rounds by the shape of a step, and so a near tie falls otherwise, --dtype float32 shows whether it is only that.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench_target import ROOT, where_measured
from peers.engine_program import Case
from peers.engine_worker import EngineWorker
from wavetrain_engine import LLM, SamplingParams

CHECKED_TOKENS = 16
_BLOCK_SIZE = 16
_FILLING_ROUNDS = 3


def figures(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """The median, and what the rounds lie between."""
    return {
        "median": round(statistics.median(values), digits),
        "low": round(min(values), digits),
        "high": round(max(values), digits),
    }


def measure_no_hits(args: argparse.Namespace) -> dict[str, object]:
    """Lets an engine with the cache and one without take turns."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_engine.py"), "--worker", "--model", str(args.model)]
    case = Case.parse(args.case)
    num_blocks = args.num_blocks or 2 * case.batch * -(-(case.num_in + case.num_out) // _BLOCK_SIZE)
    command += ["--dtype", args.dtype, "--num-blocks", str(num_blocks), "--block-size", str(_BLOCK_SIZE)]
    flags = {"on": "--enable-prefix-caching", "off": "--no-enable-prefix-caching"}
    with tempfile.TemporaryDirectory() as folder:
        engines = {key: EngineWorker(key, [*command, flag], Path(folder) / key) for key, flag in flags.items()}
        try:
            tokens = [engine.ask(do="tokens", case=args.case, seed=0)["tokens"] for engine in engines.values()]
            check_tokens(*tokens)
            for number in range(_FILLING_ROUNDS):
                for engine in engines.values():
                    engine.ask(do="run", case=args.case, seed=number)
            seconds: dict[str, list[float]] = {key: [] for key in engines}
            for number in range(args.rounds):
                order = sorted(engines, reverse=number % 2 == 1)  # who goes first is not always the same
                for key in order:
                    answer = engines[key].ask(do="run", case=args.case, seed=1000 + number)
                    seconds[key].append(answer["seconds"])
        finally:
            for engine in engines.values():
                engine.stop()
    speeds = [off / on for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    both = {f"seconds_{key}": figures(values) for key, values in seconds.items()}
    return {"case": args.case, "num_blocks": num_blocks, "speed_on_over_off": figures(speeds), **both}


def measure_hits(args: argparse.Namespace) -> dict[str, object]:
    """Lets prompts that find their prefix and the same prompts that find nothing take turns."""
    rng = random.Random(0)
    num_cached = int(args.prompt_len * args.cached)
    with LLM(model=str(args.model), dtype=args.dtype, max_num_seqs=8) as llm:

        def draw(count: int) -> list[int]:
            return [rng.randrange(8, llm.facts.vocab_size) for _ in range(count)]

        def first_token(prompt: list[int], salt: str, num_tokens: int = 1) -> tuple[float, list[int], int]:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            start = time.perf_counter()
            output = llm.generate({"prompt_token_ids": prompt}, params, cache_salt=salt)[0]
            return time.perf_counter() - start, list(output.outputs[0].token_ids), output.num_cached_tokens or 0

        prefix = draw(num_cached)
        first_token(prefix + draw(args.prompt_len - num_cached), "shared")
        prompt = prefix + draw(args.prompt_len - num_cached)
        check_tokens(*(first_token(prompt, salt, CHECKED_TOKENS)[1] for salt in ("shared", "other")))
        hits: list[float] = []
        misses: list[float] = []
        for number in range(args.rounds + 1):
            prompt = prefix + draw(args.prompt_len - num_cached)
            hit_s, _, num_hit = first_token(prompt, "shared")
            miss_s, _, num_missed = first_token(prompt, f"salt {number}")
            if num_hit <= num_cached - llm.facts.block_size or num_missed:
                raise SystemExit(
                    f"{num_hit} and {num_missed} tokens were found instead of nearly {num_cached} and none"
                )
            if number:  # the first is a warm-up
                hits.append(hit_s)
                misses.append(miss_s)
    ratios = [hit / miss for hit, miss in zip(hits, misses, strict=True)]
    case = {"prompt_len": args.prompt_len, "cached": args.cached}
    return {**case, "ttft_hit_over_miss": figures(ratios), "ttft_hit_s": figures(hits), "ttft_miss_s": figures(misses)}


def check_tokens(one: object, other: object) -> None:
    """Ends the run where two ways to the same tokens differ: then no speed means anything."""
    if one != other:
        raise SystemExit("with and without the prefix cache the tokens differ; see --dtype float32")


def main() -> None:
    """Prints a JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--dtype", default="auto", help="of weights and activations (%(default)s)")
    parser.add_argument("--case", default="8x512x16", help="of the part without hits (%(default)s)")
    parser.add_argument(
        "--num-blocks", type=int, help="of the KV cache in that part; twice what the case needs without it"
    )
    parser.add_argument("--prompt-len", type=int, default=2000, help="of the part with hits (%(default)s)")
    parser.add_argument("--cached", type=float, default=0.95, help="share of that prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of each part (%(default)s)")
    args = parser.parse_args()
    where = where_measured()
    for part, measure in (("no_hits", measure_no_hits), ("hits", measure_hits)):
        head = {"benchmark": "prefix_cache", "part": part, "model": args.model.name, "rounds": args.rounds}
        print(json.dumps({**head, **measure(args), **where}), flush=True)


if __name__ == "__main__":
    main()
