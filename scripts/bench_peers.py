#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Wavetrain beside openvino-genai, vLLM, transformers and NVIDIA's vllm_backend, in one interleaved run.

    scripts/bench_peers                                        sets everything up, measures every part: 25 minutes
    scripts/bench_peers --parts 129m,1b --rounds 3 -- --max-num-batched-tokens 4096
    scripts/bench_peers --parts 129m --engines wavetrain,openvino --out /tmp/trial
    scripts/bench_peers --parts none                           only writes tables and plot anew

Every engine loads once, in a process of its own, and answers one case at a time while the others wait; in each round
all of them do the same case with the same prompts, and the order rotates. What waits must not compute: its processor
time is looked at. Before anything is timed, every engine's greedy tokens are judged by transformers in float32.

    129m, 1b     whole cases, in seconds: the tables
    decode       a decoding step of the 1B shape at batch 1 and 16, beside the memory's speed at the size of its weights
    129m-quantized, 1b-quantized
                 whole cases: our engine in bfloat16, and both engines with weights in 8 and in 4 bits
    batch        129M shape, 64 tokens in and out, by the number of requests
    context      a decoding step of the 129M shape with 16 requests, by the length of their context
    served       through the Triton server: our `llm` and NVIDIA's vllm_backend, by perf_analyzer

What stands after -- are our engine's flags. The results go to docs/benchmarks/cpu.jsonl, which keeps the parts that
were not measured; tables and plot beside it are made from that file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_target import REPORTS, ROOT, where_measured
from peers.engine_program import Case
from peers.engine_worker import EngineWorker
from peers.plot import write_plot
from peers.results import Result, Results
from peers.tables import write_tables
from peers.vllm_backend import measure_served

ENGINES = ("wavetrain", "openvino", "vllm", "transformers")
# The same with weights in few bits: of each precision ours and theirs.
PRECISIONS = ("int8", "int4")
QUANTIZED = tuple(f"{engine}-{precision}" for precision in PRECISIONS for engine in ("wavetrain", "openvino"))
MEMORY = "memory"
_KEYS = (*ENGINES, *QUANTIZED, MEMORY)
LOGS = REPORTS / "peers"
# Batches and contexts of the plots; the outputs at a context are its last tokens.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
CONTEXT_OUT = 48
# OpenMP of some engines spins for up to 0.2 s after its last work.
_SETTLE_S = 0.3
_MAX_IDLE_SHARE = 0.05
_TICKS_S = 0.05
# A token of a bfloat16 engine may be float32's second choice; one this far below the first is wrong.
_MAX_GAP = 0.1
# Of random weights rounding to few bits changes a lot: what a wrong kernel would say lies about 4 below.
_MAX_QUANTIZED_GAP = 3.0
_JUDGED = Case(4, 64, 16)


@dataclass(frozen=True)
class Part:
    """Cases that are measured alike.

    Attributes:
        what: the workers' command: run or decode.
        engines: who takes part where nobody else was asked for; memory always does.
        is_quantized: weights in few bits are among the engines; they are loaded for such parts alone.
        rounds: at most, where no number was asked for.
        seconds: a case begins no round beyond this, once it has had `least` rounds.
    """

    name: str
    model: str
    what: str
    cases: tuple[Case, ...]
    engines: tuple[str, ...] = ENGINES
    is_quantized: bool = False
    rounds: int = 4
    least: int = 3
    seconds: float = 45.0


PARTS = (
    Part("129m", "129m", "run", tuple(map(Case.parse, ("1x32x64", "8x64x64", "32x128x64", "8x512x1")))),
    Part("batch", "129m", "run", tuple(Case(n, 64, 64) for n in BATCHES), rounds=3, least=1, seconds=12),
    Part(
        "context",
        "129m",
        "decode",
        tuple(Case(16, length - CONTEXT_OUT, CONTEXT_OUT) for length in CONTEXTS),
        rounds=3,
        least=1,
        seconds=20,
    ),
    Part(
        "1b",
        "1b",
        "run",
        tuple(map(Case.parse, ("1x32x32", "16x64x32", "4x512x1"))),
        engines=("wavetrain", "openvino"),  # the others take long, and are asked for by --engines
        seconds=60,
    ),
    Part(
        "decode",
        "1b",
        "decode",
        (Case(1, 64, 32), Case(16, 64, 32)),
        engines=("wavetrain", "openvino", MEMORY),
        rounds=4,
    ),
)
PARTS += tuple(
    dataclasses.replace(
        part, name=f"{part.name}-quantized", engines=("wavetrain", *QUANTIZED), is_quantized=True, seconds=90
    )
    for part in PARTS
    if part.name in ("129m", "1b")
)
SERVED, SERVED_ROUNDS = "served", 3


class Bench:
    """One run: where things are, what was asked for, and what was found."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self._args = args
        self._peers: Path = args.peers_dir
        self._results = results
        self._where = where_measured()

    def run(self, parts: Sequence[Part]) -> None:
        """Measures the parts, one model after the other."""
        for model, is_quantized in dict.fromkeys((part.model, part.is_quantized) for part in parts):
            chosen = [part for part in parts if (part.model, part.is_quantized) == (model, is_quantized)]
            keys = [key for key in _KEYS if any(key in self._engines(part) for part in chosen)]
            with self._workers(model, keys) as workers:
                self._judge(model, is_quantized, [worker for worker in workers if worker.key != MEMORY])
                for part in chosen:
                    takers = [worker for worker in workers if worker.key in self._engines(part)]
                    for case in part.cases:
                        self._results.add(self._measure(part, case, takers, workers))

    def _engines(self, part: Part) -> list[str]:
        asked = self._args.engines or part.engines
        if part.is_quantized:  # more are not to be had there
            return [key for key in part.engines if key in asked or key.partition("-")[0] in asked]
        return [key for key in _KEYS if key in (asked if key != MEMORY else part.engines)]

    @contextmanager
    def _workers(self, model: str, keys: Sequence[str]) -> Iterator[list[EngineWorker]]:
        workers: list[EngineWorker] = []
        try:
            for key in keys:
                start = time.monotonic()
                workers.append(EngineWorker(key, self._command(key, model), LOGS / f"{key}-{model}.log"))
                _say(f"{model}: {key} is ready after {time.monotonic() - start:.1f} s")
            yield workers
        finally:
            for worker in workers:
                worker.stop()

    def _command(self, key: str, model: str) -> list[str]:
        checkpoint = self._peers / "models" / model
        programs = ROOT / "scripts" / "peers"
        engine, _, precision = key.partition("-")
        suffix = f"-{precision}" if precision else ""
        if engine == "wavetrain":
            program = [sys.executable, str(ROOT / "scripts" / "bench_engine.py"), "--model", f"{checkpoint}{suffix}"]
            return [*program, "--worker", *self._args.engine_flags]
        if key == MEMORY:
            size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
            threads = len(os.sched_getaffinity(0))
            return [str(self._peers / "read_bandwidth"), str(size), str(threads)]
        if key == "transformers":
            return [sys.executable, str(programs / "peer_transformers.py"), "--model", str(checkpoint), "--worker"]
        python = str(self._peers / engine / "bin" / "python")
        path = f"{checkpoint}-openvino{suffix}" if engine == "openvino" else str(checkpoint)
        return [python, str(programs / f"peer_{engine}.py"), "--model", path, "--worker"]

    def _judge(self, model: str, is_quantized: bool, workers: Sequence[EngineWorker]) -> None:
        """Ends the run where an engine's tokens are not what the model says."""
        answers = [worker.ask(do="tokens", case=str(_JUDGED), seed=7) for worker in workers]
        judge = [sys.executable, str(ROOT / "scripts" / "peers" / "float32_judge.py")]
        lines = "\n".join(map(json.dumps, answers))
        done = subprocess.run(
            [*judge, "--model", str(self._peers / "models" / model)], input=lines, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            raise SystemExit("the float32 judge failed; its output above says why")
        results: list[Result] = []
        for worker, line in zip(workers, done.stdout.splitlines(), strict=True):
            verdict = json.loads(line)
            _say(f"{model}: {worker.key} against float32: {line}")
            if verdict["worst_gap"] > (_MAX_QUANTIZED_GAP if worker.key in QUANTIZED else _MAX_GAP):
                raise SystemExit(f"{worker.key} computes something else than the model: {line}")
            figures = {name: [value] for name, value in verdict.items()}
            part = f"judged-{model}{'-quantized' if is_quantized else ''}"
            results.append(Result(part, worker.key, str(_JUDGED), [], figures, self._where))
        self._results.add(results)

    def _measure(
        self, part: Part, case: Case, takers: Sequence[EngineWorker], workers: Sequence[EngineWorker]
    ) -> list[Result]:
        seconds: dict[str, list[float]] = {worker.key: [] for worker in takers}
        start = time.monotonic()
        num_rounds = 0
        while num_rounds < (self._args.rounds or part.rounds):
            offset = num_rounds % len(takers)
            for worker in (*takers[offset:], *takers[:offset]):
                seconds[worker.key].append(_turn(worker, part.what, case, num_rounds, workers))
            num_rounds += 1
            spent_s = time.monotonic() - start
            is_late = spent_s * (num_rounds + 1) / num_rounds > part.seconds
            if is_late and num_rounds >= part.least and not self._args.rounds:
                break
        best = ", ".join(f"{key} {min(values):.4f}" for key, values in seconds.items())
        _say(f"{part.name} {case}: {best} s; {num_rounds} rounds in {time.monotonic() - start:.0f} s")
        return [
            Result(part.name, worker.key, str(case), seconds[worker.key], _sizes(worker), self._where)
            for worker in takers
        ]


def _turn(worker: EngineWorker, what: str, case: Case, seed: int, workers: Sequence[EngineWorker]) -> float:
    """Has one engine do a case, and sees to it that the others rest meanwhile."""
    time.sleep(_SETTLE_S)
    others = [other for other in workers if other is not worker]
    before = {other.key: other.cpu_seconds() for other in others}
    start = time.monotonic()
    seconds = float(worker.ask(do=what, case=str(case), seed=seed)["seconds"])
    wall_s = time.monotonic() - start
    for other in others:
        busy_s = other.cpu_seconds() - before[other.key] - _TICKS_S
        if busy_s > _MAX_IDLE_SHARE * wall_s:
            _say(f"warning: {other.key} computed for {busy_s:.2f} s in the {wall_s:.2f} s that were {worker.key}'s")
    return seconds


def _sizes(worker: EngineWorker) -> dict[str, list[float]]:
    return {"bytes": [worker.facts["bytes"]]} if worker.key == MEMORY else {}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    names = [*(part.name for part in PARTS), SERVED]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(names), help="by comma, or none (%(default)s)")
    parser.add_argument("--engines", help="by comma; without it all, and wavetrain and openvino on the 1B shape")
    parser.add_argument("--rounds", type=int, help="rounds of each case; without it as many as its part has time for")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of cpu.jsonl, .md, .svg")
    parser.add_argument(
        "--peers-dir",
        type=Path,
        default=Path(os.environ.get("WAVETRAIN_PEERS_DIR") or cache / "wavetrain-peers"),
        help="what the set-up made, outside the repository (%(default)s)",
    )
    parser.add_argument("engine_flags", nargs="*", help="after --: flags of our engine")
    args = parser.parse_args()
    args.parts = [] if args.parts == "none" else args.parts.split(",")
    args.engines = args.engines.split(",") if args.engines else []
    for unknown in [*set(args.parts).difference(names), *set(args.engines).difference(ENGINES)]:
        parser.error(f"there is no {unknown!r}: parts are {', '.join(names)}; engines are {', '.join(ENGINES)}")
    return args


def main() -> None:
    """Measures, then writes tables and plot."""
    args = _parse()
    LOGS.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "cpu.jsonl")
    Bench(args, results).run([part for part in PARTS if part.name in args.parts])
    if SERVED in args.parts:
        results.add(measure_served(args.peers_dir, args.engine_flags, args.rounds or SERVED_ROUNDS))
    write_tables(results, args.out / "cpu.md")
    write_plot(results, args.out / "cpu.svg")


if __name__ == "__main__":
    main()
