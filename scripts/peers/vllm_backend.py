# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's vllm_backend on the same Triton server as our `llm`, loaded by the same perf_analyzer in turns.

The backend is a Python-based one: its model.py runs in the server's Python stub. A stub takes the packages of the
first `python` on PATH, here of an environment with vLLM's and a NumPy below 2, as the wheel's server hands broken
tensors to a newer one. It opens text files as ASCII, which fails torch, and its sys.executable is none that vLLM could
start processes with; a few lines before model.py mend both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench_perf_analyzer import install_perf_analyzer, run_once, summarize, write_input
from bench_target import REPORTS, Target, free_ports, started_target, where_measured
from peers.results import Result
from peers.vllm_environment import preloads, variables
from wavetrain_cli.triton_server import TritonServer, find_triton_server
from wavetrain_engine.environment import Environment

OURS, THEIRS = "llm", "vllm_model"
CONCURRENCY = (1, 16, 32)
NUM_WORDS, NUM_OUT, NUM_PROMPTS = 100, 64, 64
_REQUESTS_PER_STREAM, _FEWEST_REQUESTS = 3, 8
_START_TIMEOUT_S = 400
_STOP_TIMEOUT_S = 30

_CONFIG = """backend: "vllm"
instance_group [ { count: 1 kind: KIND_MODEL } ]
"""
# What runs before theirs is imported; a stub runs no sitecustomize. The last names have moved within vLLM since.
_MODEL = """import locale, os, shutil, sys
os.environ["LD_PRELOAD"] = {preloads!r}
locale.setlocale(locale.LC_ALL, "C.UTF-8")
sys.executable = sys._base_executable = shutil.which("python")
import vllm.inputs, vllm.v1.metrics.buckets, vllm.v1.metrics.loggers
vllm.v1.metrics.loggers.build_1_2_5_buckets = vllm.v1.metrics.buckets.build_1_2_5_buckets
sys.modules["vllm.inputs.data"] = vllm.inputs
from vllm_backend_model import TritonPythonModel
"""


def measure_served(peers: Path, engine_flags: Sequence[str], rounds: int) -> list[Result]:
    """Measures both servers in turns; one line for each number of streams and model."""
    install_perf_analyzer()
    checkpoint = peers / "models" / "129m"
    flags = ["--no-enable-prefix-caching", *engine_flags]
    with started_target(str(checkpoint), flags) as ours, started_vllm_backend(peers, checkpoint) as theirs:
        targets = {OURS: ours, THEIRS: theirs}
        prompts = argparse.Namespace(num_prompts=NUM_PROMPTS, num_words=NUM_WORDS, max_tokens=NUM_OUT)
        data = {model: write_input(prompts, model) for model in targets}
        for model, server in targets.items():
            run_once(server, model, data[model], 4, 8)
        return [result for streams in CONCURRENCY for result in _measure(targets, data, streams, rounds)]


def _measure(targets: dict[str, Target], data: dict[str, Path], streams: int, rounds: int) -> list[Result]:
    figures: dict[str, dict[str, list[float]]] = {model: {} for model in targets}
    for number in range(rounds):
        order = list(targets) if number % 2 == 0 else list(reversed(targets))
        for model in order:
            num_requests = max(_FEWEST_REQUESTS, _REQUESTS_PER_STREAM * streams)
            export = run_once(targets[model], model, data[model], streams, num_requests)
            found = summarize(export, streams, NUM_OUT)
            for name in ("tokens_per_s", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99"):
                figures[model].setdefault(name, []).append(getattr(found, name))
    where = where_measured()
    speeds = ", ".join(f"{model} {max(values['tokens_per_s'])}" for model, values in figures.items())
    sys.stderr.write(f"served, {streams} streams, tokens/s: {speeds}\n")
    return [
        # Seconds of a token, so that ratios are taken as everywhere.
        Result("served", model, str(streams), [1 / speed for speed in values["tokens_per_s"]], values, where)
        for model, values in figures.items()
    ]


@contextmanager
def started_vllm_backend(peers: Path, checkpoint: Path) -> Iterator[Target]:
    """Yields a Triton server with the backend on free ports, stopped with the block."""
    server = find_triton_server(Environment.read().cache_dir)
    folder = _write_repository(peers, checkpoint, server)
    ports = dict(zip(("http-port", "grpc-port", "metrics-port"), free_ports(3), strict=True))
    command = [str(server.executable), f"--model-repository={folder / 'models'}"]
    command += [f"--backend-directory={folder / 'backends'}", *(f"--{name}={port}" for name, port in ports.items())]
    log = REPORTS / "peers" / "vllm_backend.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as sink:
        # A session of its own: vLLM's processes outlive a server that ends before they do.
        environment = _environment(peers, server)
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
        try:
            _wait_until_ready(process, ports["http-port"], log)
            yield Target(url=f"127.0.0.1:{ports['grpc-port']}", served=checkpoint.name, pid=process.pid)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _write_repository(peers: Path, checkpoint: Path, server: TritonServer) -> Path:
    """Puts backends and models where the server wants them; anew, as both may have changed."""
    folder = peers / "vllm_backend_server"
    shutil.rmtree(folder, ignore_errors=True)
    backends, version = folder / "backends", folder / "models" / THEIRS / "1"
    python = (server.backend_directory or Path("/opt/tritonserver/backends")) / "python"
    # Copies, not links: the server refuses a backend that lies outside of the folder.
    shutil.copytree(python, backends / "python")
    shutil.copytree(peers / "vllm_backend" / "src", backends / "vllm")
    (backends / "vllm" / "model.py").rename(backends / "vllm" / "vllm_backend_model.py")
    (backends / "vllm" / "model.py").write_text(
        _MODEL.format(preloads=":".join(preloads(peers / "vllm"))), encoding="utf-8"
    )
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(_CONFIG, encoding="utf-8")
    arguments = {"model": str(checkpoint), "dtype": "bfloat16", "max_model_len": 4096}
    arguments |= {"enable_prefix_caching": False, "disable_log_stats": True}
    (version / "model.json").write_text(json.dumps(arguments), encoding="utf-8")
    return folder


def _environment(peers: Path, server: TritonServer) -> dict[str, str]:
    return {
        **variables(),
        **os.environ,
        # Its compiled graphs do not load under another NumPy, and would be made again and again.
        "VLLM_CACHE_ROOT": str(peers / "vllm_backend_cache"),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, server.library_path)),
        "PATH": os.pathsep.join([str(peers / "vllm_served" / "bin"), os.environ["PATH"]]),
    }


def _wait_until_ready(process: subprocess.Popen[bytes], http_port: int, log: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not _is_ready(http_port):
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
            raise SystemExit(f"the server with vllm_backend did not become ready; the end of {log}:\n{tail}")
        time.sleep(1)


def _is_ready(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False
