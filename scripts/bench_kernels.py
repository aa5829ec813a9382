#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel beside what the device can do at most, and beside its peers, in one run of under ten minutes.

    python3 scripts/bench_kernels.py --out gpu_kernels.json
    python3 scripts/bench_kernels.py --only attention --rounds 9 --out attention.json
    python3 scripts/bench_kernels.py --tables gpu_kernels.json      writes the tables of docs/benchmarks/gpu.md
    python3 scripts/bench_kernels.py --dry-run                      all of it on a CPU, in tiny sizes: no figures

Needs python3 with torch and triton, an NVIDIA GPU, and no installation. Results are compared with the truth before
anything is timed. Times are replays of CUDA graphs over buffers that rotate beyond the second-level cache, on random
data and scattered blocks; ours and the peers take turns (ABBA), a quotient is taken round by round.
Exit status: 0; 1 where a result is wrong; a missed bar is told, and changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu import machine

_TIME_LIMIT_S = 540


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(arguments)
    started = time.monotonic()
    if args.tables is not None:
        return _write_tables(args.tables)
    machine.prepare(is_dry_run=args.dry_run)
    results = _measure(args, started)
    if args.dry_run:
        results["dry_run"] = True
    _finish(results, args.out)
    return 1 if any("failed" in record for record in results["contests"]) else 0


def _measure(args: argparse.Namespace, started: float) -> dict[str, Any]:
    import torch

    from gpu.contest import run_contest
    from gpu.limits import measure_limits
    from gpu.report import write_json
    from gpu.setting import Setting

    setting = Setting.make(is_dry_run=args.dry_run)
    num_rounds = 1 if args.dry_run else args.rounds
    with torch.inference_mode():
        limits = measure_limits(setting.timer, setting.dtype, num_rounds, is_dry_run=args.dry_run)
        contests: list[dict[str, Any]] = []
        results = {"where": machine.where_measured(), "limits": limits.as_json(), "contests": contests}
        for group, make in _groups(setting).items():
            if args.only and not any(word in group for word in args.only.split(",")):
                continue
            for contest in _until_it_fails(group, make(), contests):
                if time.monotonic() - started > args.time_limit_s:
                    contests.append({"group": group, "case": contest.case, "skipped": "no time was left"})
                    break
                begun = time.monotonic()
                record = _guarded(contests, contest, partial(run_contest, contest, setting.timer, limits, num_rounds))
                if record is not None:
                    record["took_s"] = round(time.monotonic() - begun, 1)
                    contests.append(record)
                    _print_record(record)
                setting.forget()
                if args.out is not None:
                    write_json(args.out, results)
    results["took_s"] = round(time.monotonic() - started, 1)
    return results


def _groups(setting: Any) -> dict[str, Any]:
    """Returns what makes the contests of each group; first what has a bar."""
    from gpu.attention_contests import attention_contests
    from gpu.layer_contests import layer_contests, lora_contests
    from gpu.moe_contests import moe_contests
    from gpu.quantized_contests import quantized_contests
    from gpu.sampling_contests import sampling_contests

    where = {"device": setting.device, "is_dry_run": setting.is_dry_run}
    return {
        "attention": partial(attention_contests, setting.dtype, **where),
        "layer": partial(layer_contests, setting.dtype, **where),
        "quantized": partial(quantized_contests, setting.dtype, **where),
        "sampling": partial(sampling_contests, **where),
        "moe": partial(moe_contests, setting.dtype, **where),
        "lora": partial(lora_contests, setting.dtype, **where),
    }


def _until_it_fails(group: str, contests: Iterator[Any], records: list[dict[str, Any]]) -> Iterator[Any]:
    """Yields contests; one that cannot even be made ends its group, and is told."""
    try:
        yield from contests
    except Exception as error:
        records.append({"group": group, "case": "making its inputs", "failed": f"{type(error).__name__}: {error}"})
        _print_record(records[-1])


def _guarded(records: list[dict[str, Any]], contest: Any, run: Any) -> dict[str, Any] | None:
    """Runs a contest; a kernel of ours that raises is a failure of this contest, and the others go on."""
    try:
        return run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        records.append({"group": contest.group, "case": contest.case, "failed": reason[:300]})
        _print_record(records[-1])
        return None


def _print_record(record: dict[str, Any]) -> None:
    head = f"{record['group']:26} {record['case']:34}"
    if "failed" in record:
        print(f"{head} FAILED {record['failed']}", flush=True)
        return
    peers = [f"{n} {p['ours_over_theirs']['median']:.2f}x" for n, p in record["peers"].items() if "us" in p]
    share = f"{record['of_limit']['median']:.2f} of {record['limit']}"
    print(f"{head} {record['us']['median']:10.1f} us  {share:26} {', '.join(peers)}", flush=True)


def _finish(results: dict[str, Any], out: Path | None) -> None:
    from gpu.report import print_bars, write_json

    bars = [
        {"name": f"{record['group']}, {record['case']}", "sign": ">=", **record["bar"]}
        for record in results["contests"]
        if "bar" in record
    ]
    if "dry_run" in results:
        bars = [{**bar, "found": None, "kept": None} for bar in bars]
    results["bars"] = bars
    results["missing_packages"] = machine.missing_packages()
    if out is not None:
        write_json(out, results)
        print(f"wrote {out}")
    limits = results["limits"]
    print(
        f"limits: copy {limits['copy_gb_s']['median']:.0f} GB/s, read {limits['read_gb_s']['median']:.0f} GB/s, "
        f"matrix product {limits['matmul_tflop_s']['median']:.1f} TFLOP/s; {results['took_s']} s in all"
    )
    if "dry_run" in results:
        print("a dry run on the CPU: the figures mean nothing")
    num_missed = print_bars(bars)
    if num_missed:
        print(f"{num_missed} bars missed", file=sys.stderr)


def _write_tables(path: Path) -> int:
    import json

    from gpu.report import PAGE, kernel_tables, write_section

    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("dry_run"):
        print("that was a dry run; its figures do not go into the page", file=sys.stderr)
        return 2
    write_section(PAGE, "kernels", kernel_tables(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results; written after every contest")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison (%(default)s)")
    parser.add_argument(
        "--only", default="", help="groups: attention, layer, quantized, sampling, moe, lora; comma-separated"
    )
    parser.add_argument("--time-limit-s", type=float, default=_TIME_LIMIT_S, help="skips what is left (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, in tiny sizes")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="only writes the tables of the page from results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
