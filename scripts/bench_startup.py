#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long until the first token: `LLM(...)` in a fresh process, and the engine core's process until it is ready.

    .venv/bin/python scripts/bench_startup.py
    .venv/bin/python scripts/bench_startup.py --model-dir ~/models/some-model --rounds 20
    .venv/bin/python scripts/bench_startup.py --imports 30

One JSON line for each kind of process, in seconds since it was started: the median of the rounds, the least and the
most. The kinds take turns, and a first round that fills the page cache and the kernels' cache does not count.

- `llm`: `import_s` until the names are imported, `load_s` until LLM(...) has returned, `first_token_s` until
  a token was generated, `cpu_s` processor time until then.
- `core`: `ready_s` until the engine core's process takes requests.
- `torch`: `import_s` until `import torch` has returned: what nothing that computes with torch can start below.

With --imports N: the N modules that take longest to import in `llm`, themselves without what they import.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from bench_target import ROOT, percentile, where_measured

DEMO = ROOT / "model_repository" / "engine" / "1" / "demo"
READY = "the engine core is ready"

LLM_PROGRAM = """
import sys, time, json
from wavetrain_engine import LLM, SamplingParams
stamps = {"import_s": time.monotonic()}
llm = LLM(model=sys.argv[1])
stamps["load_s"] = time.monotonic()
outputs = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0.0, max_tokens=1))
stamps["first_token_s"] = time.monotonic()
cpu_s = time.process_time()
llm.close()
if len(outputs[0].outputs[0].token_ids) != 1:
    raise SystemExit("no token was generated")
print(json.dumps({"stamps": stamps, "cpu_s": cpu_s}))
"""

TORCH_PROGRAM = """
import torch, time, json
print(json.dumps({"stamps": {"import_s": time.monotonic()}, "cpu_s": time.process_time()}))
"""


def run_program(program: str, model_dir: Path) -> dict[str, float]:
    """Runs a program in a process of its own; returns its time stamps as seconds since it was started."""
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_dir)], stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    said = json.loads(done.stdout)
    return {name: moment - started_s for name, moment in said["stamps"].items()} | {"cpu_s": said["cpu_s"]}


def run_core(model_dir: Path) -> dict[str, float]:
    """Starts an engine core as the Triton models do, and ends it when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "engine.toml"
        config.write_text(f"[model]\nmodel = {json.dumps(str(model_dir))}\n", encoding="utf-8")
        command = [sys.executable, "-m", "wavetrain_engine.core_process", "--engine-config", str(config)]
        command += ["--runtime-dir", str(Path(folder) / "run"), "--server-pid", str(os.getpid())]
        started_s = time.monotonic()
        with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
            log: list[str] = []
            for line in process.stderr or ():
                log.append(line)
                if READY in line:
                    break
            ready_s = time.monotonic() - started_s
            process.send_signal(signal.SIGTERM)
            process.communicate()
        if not log or READY not in log[-1]:
            raise SystemExit("the engine core did not come up:\n" + "".join(log))
    return {"ready_s": ready_s}


def slowest_imports(model_dir: Path, count: int) -> list[tuple[str, int]]:
    """Returns the modules that take longest, with their own microseconds."""
    command = [sys.executable, "-X", "importtime", "-c", LLM_PROGRAM, str(model_dir)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    modules = [(row[2].strip(), int(row[0])) for row in rows if row[0].strip().isdigit()]
    return sorted(modules, key=lambda module: -module[1])[:count]


def main() -> None:
    """Prints one JSON line for each kind of process, and then the imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=DEMO, help="checkpoint; the demo model without it")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each kind that count (%(default)s)")
    parser.add_argument("--imports", type=int, default=0, help="slowest imports to show (%(default)s)")
    args = parser.parse_args()
    model_dir = args.model_dir.expanduser().resolve()
    kinds = {
        "llm": lambda: run_program(LLM_PROGRAM, model_dir),
        "core": lambda: run_core(model_dir),
        "torch": lambda: run_program(TORCH_PROGRAM, model_dir),
    }
    times: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in kinds}
    for number in range(args.rounds + 1):
        for kind, run in kinds.items():
            for name, seconds in run().items():
                if number:
                    times[kind][name].append(seconds)
    where = where_measured()
    for kind, named in times.items():
        figures = {
            name: {
                "median": round(percentile(values, 50), 3),
                "low": round(min(values), 3),
                "high": round(max(values), 3),
            }
            for name, values in named.items()
        }
        case = {"benchmark": "start_up", "process": kind, "model": model_dir.name, "rounds": args.rounds}
        print(json.dumps({**case, **figures, **where}), flush=True)
    for name, micros in slowest_imports(model_dir, args.imports) if args.imports else ():
        print(json.dumps({"benchmark": "start_up", "import": name, "own_us": micros}), flush=True)


if __name__ == "__main__":
    main()
