#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Is everything right on this GPU? The kernels against the reference, the engine against transformers.

    scripts/gpu_check                       python3 with torch, triton, transformers; pytest, hypothesis if there
    scripts/gpu_check --parts greedy
    scripts/gpu_check --dry-run             a little of each, on a CPU

    kernels     the unit tests of the kernels, as on a CPU but on the device and in bfloat16 too; and those of the
                engine that need a GPU
    sizes       every operation in the sizes that bench_kernels measures, in bfloat16 and float16
    greedy      tiny models of every family: greedy tokens in float32 and bfloat16, chunked, preempted, from the prefix
                cache, with graphs and without; and that no kernel is compiled once the engine is up

Several parts run at once, each in a process of its own. Prints a line for each check, then one JSON line. Exit
status: 0; 1 where something is wrong; 2 where a part cannot run for want of a package, which is named.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu import machine

_PARTS = ("kernels", "sizes", "greedy")
_TIME_LIMIT_S = 540
# For a check that is under way when the time is over.
_GRACE_S = 20
_DRY_SELECTION = "no_tokens"

_Save = Callable[[list[dict[str, Any]]], dict[str, Any]]


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
    where = machine.where_measured()

    def save(checks: list[dict[str, Any]]) -> dict[str, Any]:
        num_wrong = sum(not check["right"] for check in checks)
        summary = {"checks": len(checks), "wrong": num_wrong, "missing": lacking, "where": where}
        if args.out is not None:
            from gpu.report import write_json

            write_json(args.out, {**summary, "dry_run": args.dry_run, "results": checks})
        return summary

    checks = _check_part(parts[0], args, missing, save) if len(parts) == 1 else _check_parts(parts, args, save)
    summary = save(checks)
    print(json.dumps({"gpu_check": summary}))
    if lacking:
        print(f"missing here: {', '.join(lacking)}", file=sys.stderr)
    return 1 if summary["wrong"] or not checks else 2 if lacking else 0


def _check_part(part: str, args: argparse.Namespace, missing: dict[str, str], save: _Save) -> list[dict[str, Any]]:
    """Runs the checks of a part here, and saves after each: what comes after may end the process."""
    started, checks = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for check in _checks(part, Path(folder), args, started, missing):
            checks.append({"part": part, "name": check.name, "right": check.is_right, "detail": check.detail})
            word = "ok   " if check.is_right else "WRONG"
            print(f"{word} {time.monotonic() - started:5.0f} s  {check.name}: {check.detail}", flush=True)
            save(checks)
    return checks


def _check_parts(parts: list[str], args: argparse.Namespace, save: _Save) -> list[dict[str, Any]]:
    """Runs each part in a process of its own, all at once.

    Most of the time is compiling, which is a core's; and after a kernel that reads beyond its tensors nothing works any
    more in its process.
    """
    options = [
        "--time-limit-s",
        str(args.time_limit_s),
        "--tests",
        args.tests,
        *(["--dry-run"] if args.dry_run else []),
    ]
    deadline = time.monotonic() + args.time_limit_s + _GRACE_S
    with tempfile.TemporaryDirectory() as folder:
        files = {part: Path(folder) / f"{part}.json" for part in parts}
        running = {
            part: subprocess.Popen(
                [sys.executable, __file__, "--parts", part, "--out", str(file), *options],
                env=machine.child_environment(),
            )
            for part, file in files.items()
        }
        try:
            while any(child.poll() is None for child in running.values()) and time.monotonic() < deadline:
                time.sleep(0.5)
                save(_results(files))
        finally:
            for child in running.values():
                child.kill()
                child.wait()
        ends = [_end_of(part, running[part].returncode, files[part]) for part in parts]
        return [*_results(files), *(end for end in ends if end is not None)]


def _results(files: dict[str, Path]) -> list[dict[str, Any]]:
    texts = [file.read_text(encoding="utf-8") for file in files.values() if file.exists()]
    return [check for text in texts for check in json.loads(text)["results"]]


def _end_of(part: str, status: int, file: Path) -> dict[str, Any] | None:
    """Returns what is wrong with how a part's process ended."""
    if status in (0, 1, 2) and file.exists():
        return None
    detail = "not done in time" if status == -signal.SIGKILL else f"its process ended with {status}"
    return {"part": part, "name": f"all of {part}", "right": False, "detail": detail}


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
        yield from unit_test_checks(folder, selection, left_s)


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
