#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Is everything right on this GPU? The kernels against the reference, the engine against transformers.

    scripts/gpu_check                       python3 with torch, triton, transformers; pytest, hypothesis if there
    scripts/gpu_check --parts greedy
    scripts/gpu_check --dry-run             a little of each, on a CPU

    kernels     the unit tests of the kernels, as on a CPU but on the device and in bfloat16 too
    sizes       every operation in the sizes that bench_kernels measures, in bfloat16 and float16
    greedy      tiny models of every family: greedy tokens in float32 and bfloat16, chunked, preempted, from the prefix
                cache, with graphs and without; and that no kernel is compiled once the engine is up

Prints a line for each check, then one JSON line. Exit status: 0; 1 where something is wrong; 2 where a part cannot run
for want of a package, which is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import machine

_PARTS = ("kernels", "sizes", "greedy")
_TIME_LIMIT_S = 570
_DRY_SELECTION = "no_tokens"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(arguments)
    machine.prepare(is_dry_run=args.dry_run)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU: torch sees none here. --dry-run executes a little of everything on a CPU")
    parts = args.parts.split(",")
    missing = machine.missing_packages()
    lacking = [f"{name} (for {use})" for name, use in missing.items() if use != "a peer"]
    started, checks = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            for check in _checks(part, Path(folder), args, started, missing):
                checks.append({"part": part, "name": check.name, "right": check.is_right, "detail": check.detail})
                word = "ok   " if check.is_right else "WRONG"
                print(f"{word} {time.monotonic() - started:5.0f} s  {check.name}: {check.detail}", flush=True)
    num_wrong = sum(not check["right"] for check in checks)
    summary = {"checks": len(checks), "wrong": num_wrong, "missing": lacking, "where": machine.where_measured()}
    if args.out is not None:
        from gpu.report import write_json

        write_json(args.out, {**summary, "dry_run": args.dry_run, "results": checks})
    print(json.dumps({"gpu_check": summary}))
    if lacking:
        print(f"missing here: {', '.join(lacking)}", file=sys.stderr)
    return 1 if num_wrong or not checks else 2 if lacking else 0


def _checks(
    part: str, folder: Path, args: argparse.Namespace, started: float, missing: dict[str, str]
) -> Iterator[Any]:
    """Yields the checks of a part; none where it cannot run."""
    left_s = args.time_limit_s - (time.monotonic() - started)
    if part == "greedy":
        import torch

        from gpu.greedy_checks import greedy_checks

        device = torch.device("cpu" if args.dry_run else "cuda")
        yield from _while_there_is_time(greedy_checks(folder, device, is_dry_run=args.dry_run), args, started)
        return
    from gpu.kernel_checks import contest_checks, unit_test_checks
    from gpu.setting import Setting

    if part == "sizes":
        setting = Setting.make(is_dry_run=args.dry_run)
        yield from _while_there_is_time(contest_checks(setting), args, started)
    elif "the kernel tests" not in missing.values():
        selection = _DRY_SELECTION if args.dry_run else args.tests
        yield from unit_test_checks(folder, selection, max(left_s * 0.6, 30))


def _while_there_is_time(checks: Iterator[Any], args: argparse.Namespace, started: float) -> Iterator[Any]:
    from gpu.greedy_checks import Check

    for check in checks:
        yield check
        if time.monotonic() - started > args.time_limit_s:
            yield Check("what comes after", is_right=False, detail="no time was left")
            return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=",".join(_PARTS), help="comma-separated (%(default)s)")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="which unit tests, as pytest's -k takes it")
    parser.add_argument("--out", type=Path, help="JSON file for all checks")
    parser.add_argument("--time-limit-s", type=float, default=_TIME_LIMIT_S, help="for everything (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="a little of each part, on a CPU")
    return parser


def _parts(text: str) -> str:
    unknown = [part for part in text.split(",") if part not in _PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(_PARTS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
