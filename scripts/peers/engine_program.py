# SPDX-License-Identifier: Apache-2.0
"""What every engine's benchmark program is made of: cases, prompts, measuring, and answering as a worker.

A case `NxIxO` is N requests at once with I prompt tokens and exactly O output tokens each, greedy, without a prefix
cache. A program loads its engine once and then either measures cases and prints one JSON line for each, or, with
--worker, answers commands from its standard input, one JSON object a line, so that engines can take turns:

    {"do": "run", "case": "8x64x64", "seed": 1}     {"seconds": 0.61}
    {"do": "decode", "case": "16x80x48", "seed": 1} {"seconds": 0.02}   (a step in which every request decodes)
    {"do": "tokens", "case": "2x64x16", "seed": 1}  {"prompts": [...], "tokens": [...]}

It needs numpy and nothing else of ours: it runs in the environments of the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import numpy as np

CASES = "1x32x64,8x64x64,32x128x64,8x512x1"
# All peers get the same: a cache of this size and steps of at most this many tokens.
KV_CACHE_GIB = 2
MAX_BATCHED_TOKENS = 2048
_FIRST_TOKEN_ID, _VOCAB_SIZE = 3, 16000  # below every random model's vocabulary, above its special tokens


class Engine(Protocol):
    """An engine that has loaded its model."""

    name: str

    def generate(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        """Returns each request's output tokens, by the way that is the engine's fastest."""
        ...

    def token_times(self, prompts: list[list[int]], num_out: int) -> list[list[float]]:
        """Returns, for each request, when each of its output tokens came, by time.perf_counter."""
        ...


@dataclass(frozen=True)
class Case:
    """So many requests of one shape."""

    batch: int
    num_in: int
    num_out: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads NxIxO.

        Raises:
            ValueError: it is something else.
        """
        batch, num_in, num_out = (int(item) for item in text.split("x"))
        return cls(batch, num_in, num_out)

    def __str__(self) -> str:
        return f"{self.batch}x{self.num_in}x{self.num_out}"

    def prompts(self, seed: int) -> list[list[int]]:
        """Draws the prompts; equal for all engines."""
        rng = np.random.default_rng(seed)
        return rng.integers(_FIRST_TOKEN_ID, _VOCAB_SIZE, (self.batch, self.num_in)).tolist()


def warm_up(engine: Engine, case: Case) -> None:
    """Has the engine make what it makes on first use of a shape."""
    check_lengths(engine.generate(case.prompts(seed=99), min(case.num_out, 4)), min(case.num_out, 4))


def run_seconds(engine: Engine, case: Case, seed: int) -> float:
    """Measures a case from handing the prompts over to having every token."""
    prompts = case.prompts(seed)
    start = time.perf_counter()
    tokens = engine.generate(prompts, case.num_out)
    seconds = time.perf_counter() - start
    check_lengths(tokens, case.num_out)
    return seconds


def decode_seconds(engine: Engine, case: Case, seed: int) -> float:
    """Measures a step in which every request of the case decodes and none is in its prompt: the median."""
    times = engine.token_times(case.prompts(seed), case.num_out)
    check_lengths(times, case.num_out)
    latest = max(times, key=lambda stamps: stamps[0])
    first_end = min(stamps[-1] for stamps in times)
    stamps = [stamp for stamp in latest if stamp <= first_end]
    if len(stamps) < 4:
        raise RuntimeError(f"{case}: too few steps in which all requests decode; ask for more output tokens")
    return float(np.median(np.diff(stamps)))


def check_lengths(lists: Sequence[Sequence[object]], num_out: int) -> None:
    """A figure must not stand for lost tokens.

    Raises:
        RuntimeError: a request brought another number of tokens than it asked for.
    """
    lengths = {len(item) for item in lists}
    if lengths != {num_out}:
        raise RuntimeError(f"requests brought {sorted(lengths)} tokens instead of {num_out}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what all programs are told."""
    parser.add_argument("--model", required=True, help="the model, in the engine's own format")
    parser.add_argument("--cases", default=CASES, help="NxIxO, by comma (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of every case (%(default)s)")
    parser.add_argument("--decode", action="store_true", help="measure a decoding step instead of the whole case")
    parser.add_argument("--worker", action="store_true", help="answer commands from standard input")


def run(load: Callable[[argparse.Namespace], Engine], args: argparse.Namespace) -> None:
    """Loads the engine and does what the arguments ask for."""
    # What libraries print belongs into the log: standard output carries answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    start = time.perf_counter()
    engine = load(args)
    if args.worker:
        _print(answers, {"engine": engine.name, "load_s": round(time.perf_counter() - start, 2)})
        serve(engine, sys.stdin, answers)
        return
    for case in map(Case.parse, args.cases.split(",")):
        warm_up(engine, case)
        measure = decode_seconds if args.decode else run_seconds
        seconds = [measure(engine, case, seed) for seed in range(args.rounds)]
        _print(answers, summary(engine.name, case, seconds, is_decode=args.decode))


def serve(engine: Engine, commands: TextIO, answers: TextIO) -> None:
    """Answers commands until there are no more; a command that fails gets {"error": ...}."""
    warm: set[Case] = set()
    for line in commands:
        _print(answers, _answer(engine, line, warm))


def _answer(engine: Engine, line: str, warm: set[Case]) -> dict[str, Any]:
    try:
        command = json.loads(line)
        case, seed = Case.parse(command["case"]), command["seed"]
        if case not in warm:
            warm_up(engine, case)
            warm.add(case)
        if command["do"] == "tokens":
            prompts = case.prompts(seed)
            tokens = engine.generate(prompts, case.num_out)
            check_lengths(tokens, case.num_out)
            return {"prompts": prompts, "tokens": tokens}
        measure = {"run": run_seconds, "decode": decode_seconds}[command["do"]]
        return {"seconds": measure(engine, case, seed)}
    except Exception as error:  # whoever asked decides what it means
        return {"error": f"{type(error).__name__}: {error}"}


def summary(name: str, case: Case, seconds: list[float], *, is_decode: bool) -> dict[str, object]:
    """One line of results: the median, and how far apart the rounds were (greatest by least)."""
    median = statistics.median(seconds)
    line = {"engine": name, "case": str(case), "seconds": round(median, 5)}
    line |= {"spread": round(max(seconds) / min(seconds), 3)}
    if is_decode:
        return {**line, "decode_tokens_per_s": round(case.batch / median, 1)}
    return {
        **line,
        "output_tokens_per_s": round(case.batch * case.num_out / median, 1),
        "total_tokens_per_s": round(case.batch * (case.num_in + case.num_out) / median, 1),
    }


def _print(sink: TextIO, line: dict[str, Any]) -> None:
    sink.write(json.dumps(line) + "\n")
    sink.flush()
