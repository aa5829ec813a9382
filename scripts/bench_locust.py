#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A minute of locust users streaming over gRPC; figures on the terminal, locust's HTML report in reports/.

    scripts/bench_locust                                           starts the demo model, 32 users, 60 s on llm
    scripts/bench_locust --url 127.0.0.1:8001 --users 64 --duration-s 300 --triton-model ensemble

The report's rows: `TTFT` (to the first token), `ITL` (between chunks), `generate` (whole requests; its average size
is the number of tokens). See scripts/locustfile.py for the users.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench_target import REPORTS, ROOT, Target, add_target_arguments, target, where_measured


def main() -> None:
    """Runs locust against the server; fails when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_arguments(parser)
    parser.add_argument("--users", type=int, default=32, help="streams at once (%(default)s)")
    parser.add_argument("--duration-s", type=int, default=60, help="length of the test (%(default)s)")
    parser.add_argument("--triton-model", default="llm", choices=("llm", "ensemble"))
    args = parser.parse_args()
    folder = REPORTS / "locust"
    folder.mkdir(parents=True, exist_ok=True)
    html = folder / f"{args.triton_model}_{args.users}.html"
    with target(args) as server:
        summary = run_locust(args, server, html, folder / "summary.json")
    case = {"benchmark": "locust", "model": server.served, "triton_model": args.triton_model, "users": args.users}
    line = json.dumps(
        {**case, "num_words": args.num_words, "max_tokens": args.max_tokens, **summary, **where_measured()}
    )
    with (folder / "results.jsonl").open("a", encoding="utf-8") as sink:
        sink.write(line + "\n")
    print(
        f"\n{args.triton_model}, {args.users} users, {summary['seconds']} s: {summary['num_requests']} requests, "
        f"{summary['num_failures']} failed\n"
        f"  tokens/s {summary['tokens_per_s']}\n"
        f"  TTFT p50/p99 {summary['ttft_ms_p50']} / {summary['ttft_ms_p99']} ms\n"
        f"  ITL  p50/p99 {summary['itl_ms_p50']} / {summary['itl_ms_p99']} ms\n"
        f"  report: {html.relative_to(ROOT)}\n{line}"
    )
    if summary["num_failures"] or not summary["num_requests"]:
        raise SystemExit(1)


def run_locust(args: argparse.Namespace, server: Target, html: Path, summary: Path) -> dict[str, float]:
    """Runs one load test; returns the users' figures."""
    summary.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "locust", "-f", str(ROOT / "scripts" / "locustfile.py"), "--headless", "--only-summary",
        "-u", str(args.users), "-r", str(args.users), "-t", f"{args.duration_s}s", "--stop-timeout", "30",
        "--host", server.url, "--html", str(html), "--summary", str(summary), "--triton-model", args.triton_model,
        "--max-tokens", str(args.max_tokens), "--num-words", str(args.num_words),
        "--num-prompts", str(args.num_prompts),
    ]  # fmt: skip
    subprocess.run(command, check=False)  # its exit status is 1 when a request failed; the summary tells
    if not summary.exists():
        raise SystemExit("locust ended without a result; its output above says why")
    return json.loads(summary.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
