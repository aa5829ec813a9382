#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU beside the device's limits, its own graphs and transformers' continuous batching, in one run.

    python3 scripts/bench_gpu.py --out gpu_engine.json
    python3 scripts/bench_gpu.py --parts step,replay --out steps.json
    python3 scripts/bench_gpu.py --tables gpu_engine.json       writes the tables of docs/benchmarks/gpu.md
    python3 scripts/bench_gpu.py --dry-run                      all of it on a CPU with a tiny model: no figures

Needs python3 with torch, triton and transformers, an NVIDIA GPU with 80 GB or more, no checkpoint and no installation:
weights of Llama-3.1-8B's shape are drawn on the device. Ends within --time-limit-s; what did not fit is told.

    step          the time between tokens at batch 1, as a + b * context, over bytes / measured copy bandwidth
    idle          the share of the time without a kernel, 32 requests decoding
    replay        a step of the engine over a replay of its own graph
    throughput    1000 tokens in and 1000 out, 256 requests at once; transformers does the same in a process of its own
    start         from the start of the process to a first token, the weights excluded

Exit status: 0; 1 where something that should run failed; a missed bar is told, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import machine

_PARTS = ("step", "idle", "replay", "throughput")
_TIME_LIMIT_S = 570
# Left to write the results after the last process was ended.
_RESERVE_S = 10
# A second run of our throughput, or of parts that failed, is started only with so much time left.
_AGAIN_S = 100
# The peer's whole process. Where it is not done by then, how far behind it is at least is known.
_PEER_LIMIT_S = 200
_NOT_DONE = "not done after"


@dataclass(frozen=True)
class Bar:
    """A figure of the results that we promise something of."""

    name: str
    path: tuple[str, ...]
    sign: str
    least: float
    of: str

    def judge(self, results: dict[str, Any]) -> dict[str, Any]:
        """Returns what was found and whether the promise is kept; None where it was not measured."""
        found: Any = results
        among: Any = None
        for key in self.path:
            among = found
            found = found.get(key) if isinstance(found, dict) else None
        kept = None
        if isinstance(found, int | float):
            kept = found <= self.least if self.sign == "<=" else found >= self.least
        if not kept and isinstance(among, dict) and among.get("is_lower_bound"):
            kept = None  # it may be more
        return {"name": self.name, "sign": self.sign, "least": self.least, "of": self.of, "found": found, "kept": kept}


BARS = (
    Bar("step at batch 1", ("parts", "step", "step_over_floor"), "<=", 1.35, "bytes / measured copy bandwidth"),
    Bar("GPU idle at batch 32", ("parts", "idle", "idle_share"), "<=", 0.05, "share of the time"),
    Bar("throughput", ("parts", "throughput", "ours_over_theirs"), ">=", 1.5, "transformers' generate_batch"),
    Bar("engine at batch 32", ("parts", "replay", "32", "engine_of_replay"), ">=", 0.95, "replaying its own graph"),
    Bar("engine at batch 256", ("parts", "replay", "256", "engine_of_replay"), ">=", 0.95, "replaying its own graph"),
    Bar("start to first token", ("parts", "start", "without_weights_s"), "<=", 10, "seconds, weights excluded"),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(arguments)
    if args.tables is not None:
        return _write_tables(args.tables)
    parts = [part for part in args.parts.split(",") if part]
    shape = args.shape or ("tiny" if args.dry_run else "llama-3.1-8b")
    if args.worker is not None:
        from gpu.bench_worker import run_worker

        flags = dict(args.engine_flag)
        run_worker(args.worker, parts, shape, args.results, args.started_at, flags, is_dry_run=args.dry_run)
        return 0
    machine.prepare(is_dry_run=False)
    results = _measure(args, parts, shape)
    return _finish(results, args.out)


def _measure(args: argparse.Namespace, parts: list[str], shape: str) -> dict[str, Any]:
    from gpu.report import write_json

    deadline = time.monotonic() + args.time_limit_s
    results: dict[str, Any] = {"where": machine.where_measured(), "shape": shape, "parts": {}, "dry_run": args.dry_run}
    results["engine_flags"] = dict(args.engine_flag)
    with tempfile.TemporaryDirectory() as folder:
        ours = _run(args, "wavetrain", parts, shape, Path(folder) / "ours", deadline)
        lost = [part for part in parts if "failed" in ours[part]][1:]
        if lost and deadline - time.monotonic() > _AGAIN_S:  # the first may have taken the others down with it
            saved = _run(args, "wavetrain", lost, shape, Path(folder) / "saved", deadline)
            ours = {**saved, **ours, **{part: saved[part] for part in lost}}
        results["parts"] = ours
        if args.out is not None:
            write_json(args.out, results)
        if "throughput" in parts and args.peer:
            theirs_by = min(deadline, time.monotonic() + args.peer_limit_s)
            theirs = _run(args, "transformers", ["throughput"], shape, Path(folder) / "theirs", theirs_by)
            again: dict[str, Any] = {}
            if args.dry_run or deadline - time.monotonic() > _AGAIN_S:
                again = _run(args, "wavetrain", ["throughput"], shape, Path(folder) / "again", deadline)
            results["peer"] = theirs
            results["parts"]["throughput"] = _compare(ours, theirs, again)
    results["took_s"] = round(args.time_limit_s - (deadline - time.monotonic()), 1)
    return results


def _run(
    args: argparse.Namespace, engine: str, parts: list[str], shape: str, folder: Path, deadline: float
) -> dict[str, Any]:
    """Runs one engine's process, until it ends or the time is over; returns its results by part."""
    from gpu.bench_worker import read_results

    folder.mkdir()
    file = folder / "results.jsonl"
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", engine, "--parts", ",".join(parts)]
    command += ["--shape", shape, "--results", str(file), "--started-at", str(time.time())]
    command += ["--dry-run"] if args.dry_run else []
    for name, value in args.engine_flag:
        command += ["--engine-flag", f"{name}={json.dumps(value)}"]
    print(f"{engine}: {', '.join(parts)}", flush=True)
    started = time.monotonic()
    try:
        limit_s = max(deadline - started - _RESERVE_S, 1)
        done = subprocess.run(command, env=machine.child_environment(), timeout=limit_s, check=False)
        problem = f"its process ended with {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"{_NOT_DONE} {time.monotonic() - started:.0f} s"
    found = read_results(file)
    if "began_at" in found:
        found["ran_s"] = round(time.time() - found["began_at"], 1)
    for part in parts:
        if part not in found:
            found[part] = {"failed": problem or "no result", "ran_s": round(time.monotonic() - started, 1)}
    return found


def _compare(ours: dict[str, Any], theirs: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Puts our throughput (the mean of before and after, where both were measured) beside the peer's."""
    runs = [run["throughput"] for run in (ours, again) if "output_tokens_per_s" in run.get("throughput", {})]
    found: dict[str, Any] = {"ours": runs, "theirs": theirs["throughput"]}
    if runs and "output_tokens_per_s" in theirs["throughput"]:
        mean = sum(run["output_tokens_per_s"] for run in runs) / len(runs)
        found["ours_over_theirs"] = round(mean / theirs["throughput"]["output_tokens_per_s"], 3)
    elif runs and "ran_s" in theirs and theirs["throughput"]["failed"].startswith(_NOT_DONE):
        # It had done less than all when it was ended.
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        found |= {"ours_over_theirs": round(theirs["ran_s"] / seconds, 3), "is_lower_bound": True}
    if not runs:
        found["failed"] = ours.get("throughput", {}).get("failed", "not measured")
    return found


def _finish(results: dict[str, Any], out: Path | None) -> int:
    from gpu.report import print_bars, write_json

    results["bars"] = [bar.judge(results) for bar in BARS]
    if results["dry_run"]:
        results["bars"] = [{**bar, "found": None, "kept": None} for bar in results["bars"]]
        print("a dry run on the CPU: the figures mean nothing")
    if out is not None:
        write_json(out, results)
        print(f"wrote {out}")
    print_bars(results["bars"])
    failed = {part: found["failed"] for part, found in results["parts"].items() if "failed" in found}
    for part, reason in failed.items():
        print(f"FAILED {part}: {reason}")
    return 1 if failed else 0


def _write_tables(path: Path) -> int:
    from gpu.report import PAGE, engine_tables, write_section

    results = json.loads(path.read_text(encoding="utf-8"))
    if results["dry_run"]:
        print("that was a dry run; its figures do not go into the page", file=sys.stderr)
        return 2
    write_section(PAGE, "engine", engine_tables(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--parts", type=_parts, default=",".join(_PARTS), help="comma-separated (%(default)s)")
    parser.add_argument("--shape", choices=("llama-3.1-8b", "0.5b", "tiny"), help="default: llama-3.1-8b")
    parser.add_argument(
        "--engine-flag",
        type=_flag,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of our engine, its value as JSON: max_num_batched_tokens=8192",
    )
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave transformers out")
    parser.add_argument(
        "--peer-limit-s", type=float, default=_PEER_LIMIT_S, help="for transformers of it (%(default)s)"
    )
    parser.add_argument("--time-limit-s", type=float, default=_TIME_LIMIT_S, help="for everything (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with a tiny model")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="only writes the tables of the page from results")
    parser.add_argument("--worker", choices=("wavetrain", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started-at", type=float, help=argparse.SUPPRESS)
    return parser


def _flag(text: str) -> tuple[str, Any]:
    name, is_flag, value = text.partition("=")
    if not is_flag:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parts(text: str) -> str:
    unknown = [part for part in text.split(",") if part not in _PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(_PARTS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
