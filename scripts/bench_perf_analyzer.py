#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Loads the Triton models with NVIDIA's perf_analyzer: TTFT, ITL and tokens/s by concurrency.

    scripts/bench_perf_analyzer                                    starts the demo model, measures llm and ensemble
    scripts/bench_perf_analyzer --url 127.0.0.1:8001               measures a running server
    scripts/bench_perf_analyzer --model-dir DIR -- --max-num-seqs 32

perf_analyzer itself comes from the last wheel of tritonclient that holds it for an old glibc. Figures are computed
from the time stamps of its profile export: TTFT from a request's start to its first response with a token, ITL
between responses, tokens/s from the first request's start to the last response. Prints a table's rows and JSON
lines; the lines are kept in reports/perf_analyzer/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from bench_target import REPORTS, Target, add_target_arguments, make_prompts, percentile, target, where_measured

# Newer wheels want a newer glibc, then hold no binary at all.
WHEEL = "tritonclient==2.51.0"
TOOL_FOLDER = REPORTS / "tools" / "perf_analyzer"
# The wheel's binary wants these by these names; the Triton server's wheel carries them under others.
PERF_ANALYZER = ("env", f"LD_LIBRARY_PATH={TOOL_FOLDER / 'lib'}", str(TOOL_FOLDER / "perf_analyzer"))
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_MAX_RUNS = 5


@dataclass(frozen=True)
class Figures:
    """What one run of perf_analyzer found. Times in milliseconds."""

    concurrency: int
    num_requests: int
    tokens_per_s: float
    requests_per_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    tokens_per_response: float


def main() -> None:
    """Measures every model at every concurrency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_arguments(parser)
    parser.add_argument("--models", default="llm,ensemble", help="Triton models, by comma (%(default)s)")
    parser.add_argument("--concurrency", default="1,8,16,32", help="streams at once, by comma (%(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="requests at least; 4 for each stream (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of every case (%(default)s)")
    args = parser.parse_args()
    install_perf_analyzer()
    where = where_measured()
    print(f"{'model':<10} {'streams':>7} {'tok/s':>8} {'req/s':>7} {'TTFT p50/p99 ms':>18} {'ITL p50/p99 ms':>18}")
    with target(args) as server:
        for model in args.models.split(","):
            data = write_input(args, model)
            run_once(server, model, data, 4, 8)  # first requests pay for what is made on first use
            for concurrency in map(int, args.concurrency.split(",")):
                for _ in range(args.rounds):
                    num_requests = max(args.requests, 4 * concurrency)
                    export = run_once(server, model, data, concurrency, num_requests)
                    report(args, server, model, summarize(export, concurrency, args.max_tokens), where)


def install_perf_analyzer() -> None:
    """Fetches perf_analyzer, once, and checks that it starts."""
    binary = TOOL_FOLDER / "perf_analyzer"
    libraries = TOOL_FOLDER / "lib"
    if not binary.exists():
        libraries.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest", str(TOOL_FOLDER)]
        if subprocess.run(pip, check=False).returncode != 0:
            raise SystemExit(f"could not fetch {WHEEL}, which holds perf_analyzer; is the package index reachable?")
        (wheel,) = TOOL_FOLDER.glob("tritonclient-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/bin/perf_analyzer"))
            partial = binary.with_suffix(".partial")
            partial.write_bytes(archive.read(name))
        partial.chmod(0o755)
        partial.replace(binary)
        wheel.unlink()
    for name, pattern in LIBRARIES.items():
        link = libraries / name
        found = next(
            (path for folder in sys.path for path in Path(folder).glob(f"nvidia_pytriton.libs/{pattern}")), None
        )
        if found is not None and not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(found)
    check = subprocess.run([*PERF_ANALYZER, "--version"], capture_output=True, text=True, check=False)
    if "Version" not in check.stdout + check.stderr:
        raise SystemExit(
            f"perf_analyzer does not start: {check.stderr.strip()}\nIt needs {' and '.join(LIBRARIES)}: from the "
            "nvidia-pytriton wheel (scripts/setup installs it), or from the packages libb64-0d and CUDA's runtime."
        )


def write_input(args: argparse.Namespace, model: str) -> Path:
    """Writes the requests in the model's dialect; every one asks for exactly max_tokens."""
    entries = [_entry(model, prompt, args.max_tokens) for prompt in make_prompts(args.num_prompts, args.num_words)]
    path = REPORTS / "perf_analyzer" / f"{model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": entries}), encoding="utf-8")
    return path


def _entry(model: str, prompt: str, max_tokens: int) -> dict[str, list[object]]:
    entry: dict[str, list[object]] = {
        "text_input": [prompt],
        "stream": [True],
        "exclude_input_in_output": [True],
        "return_num_output_tokens": [True],
    }
    if model == "ensemble":
        return {**entry, "max_tokens": [max_tokens], "end_id": [-1]}
    sampling = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return {**entry, "sampling_parameters": [json.dumps(sampling)]}


def run_once(server: Target, model: str, data: Path, concurrency: int, num_requests: int) -> Path:
    """Runs perf_analyzer for one case; returns its profile export.

    It exports every output, and for a number in an empty one whatever lies in memory: where that is no number, the
    file ends in the middle, and the case is run again.
    """
    export = data.with_name(f"{model}_{concurrency}.export.json")
    command = [
        *PERF_ANALYZER, "-m", model, "-u", server.url, "-i", "grpc", "--async", "--streaming",
        f"--concurrency-range={concurrency}", f"--request-count={num_requests}", "--input-data", str(data),
        f"--profile-export-file={export}", "--stability-percentage=999",
    ]  # fmt: skip
    for _ in range(_MAX_RUNS):
        export.unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not export.exists():
            raise SystemExit(f"perf_analyzer failed on {model}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        if export.read_bytes().rstrip().endswith(b"}"):
            return export
    raise SystemExit(f"perf_analyzer wrote only a part of {export} each time; run it again")


def summarize(export: Path, concurrency: int, max_tokens: int) -> Figures:
    """Computes the figures from the time stamps, after checking that every request brought every token."""
    (experiment,) = json.loads(export.read_text(encoding="utf-8"))["experiments"]
    ttft, gaps, starts, ends = [], [], [], []
    num_responses = 0
    for request in experiment["requests"]:
        outputs = request["response_outputs"]
        # The server marks the end with a response that has no outputs.
        pairs = zip(request["response_timestamps"], outputs, strict=True)
        stamps = [stamp for stamp, output in pairs if output.get("text_output") is not None]
        num_tokens = sum(int(output.get("num_output_tokens", 0)) for output in outputs)
        if num_tokens != max_tokens:
            raise SystemExit(f"a request brought {num_tokens} tokens instead of {max_tokens}; its figures are no use")
        num_responses += len(stamps)
        starts.append(request["timestamp"])
        ends.append(stamps[-1])
        ttft.append((stamps[0] - request["timestamp"]) / 1e6)
        gaps += [(later - earlier) / 1e6 for earlier, later in pairwise(stamps)]
    seconds = (max(ends) - min(starts)) / 1e9
    num_requests = len(starts)
    return Figures(
        concurrency=concurrency,
        num_requests=num_requests,
        tokens_per_s=round(num_requests * max_tokens / seconds, 1),
        requests_per_s=round(num_requests / seconds, 2),
        ttft_ms_p50=round(percentile(ttft, 50), 1),
        ttft_ms_p99=round(percentile(ttft, 99), 1),
        itl_ms_p50=round(percentile(gaps, 50), 2),
        itl_ms_p99=round(percentile(gaps, 99), 2),
        tokens_per_response=round(num_requests * max_tokens / num_responses, 2),
    )


def report(args: argparse.Namespace, server: Target, model: str, figures: Figures, where: dict[str, object]) -> None:
    """Prints the table's row, and appends the JSON line to the report."""
    f = figures
    print(
        f"{model:<10} {f.concurrency:>7} {f.tokens_per_s:>8.1f} {f.requests_per_s:>7.2f} "
        f"{f.ttft_ms_p50:>10.1f}/{f.ttft_ms_p99:<7.1f} {f.itl_ms_p50:>10.2f}/{f.itl_ms_p99:<7.2f}",
        flush=True,
    )
    case = {"benchmark": "perf_analyzer", "model": server.served, "triton_model": model, "num_words": args.num_words}
    line = json.dumps({**case, "max_tokens": args.max_tokens, **asdict(figures), **where})
    path = REPORTS / "perf_analyzer" / "results.jsonl"
    with path.open("a", encoding="utf-8") as sink:
        sink.write(line + "\n")
    print(line, file=sys.stderr if sys.stdout.isatty() else sys.stdout, flush=True)


if __name__ == "__main__":
    main()
