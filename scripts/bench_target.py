# SPDX-License-Identifier: Apache-2.0
"""What the load benchmarks measure: a running server, or one they start; and where it was measured.

Several programs load the same server, two of them with the same prompts; this module has what their scripts share, so
that their figures can be put side by side.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
STOP_TIMEOUT_S = 60

_WORDS = tuple(
    "def self return class import value name for in if not None True path data list dict key item index result error "  # noqa: SIM905
    "raise except try with open read write file line text string number count size type object method call".split()
)


@dataclass(frozen=True)
class Target:
    """The server under test. `pid` is its first process's, 0 where it was not started here."""

    url: str
    served: str
    pid: int = 0


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments by which a person says what to measure."""
    parser.add_argument("--url", help="gRPC address of a running server; without it one is started")
    parser.add_argument("--model-dir", help="checkpoint for the server that is started; the demo model without it")
    parser.add_argument("--num-words", type=int, default=100, help="words in a prompt (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="output tokens of each request (%(default)s)")
    parser.add_argument("--num-prompts", type=int, default=64, help="different prompts (%(default)s)")
    parser.add_argument("serve_flags", nargs="*", help="after --: flags for `wavetrain serve`")


def make_prompts(num_prompts: int, num_words: int) -> list[str]:
    """Returns prompts of random words, always the same ones; they share no prefix that a cache could use."""
    rng = random.Random(0)
    return [" ".join(rng.choices(_WORDS, k=num_words)) for _ in range(num_prompts)]


@contextmanager
def target(args: argparse.Namespace) -> Iterator[Target]:
    """Yields the server that the arguments name, started and stopped here where they name none."""
    if args.url is not None:
        yield Target(url=args.url, served="a running server")
        return
    with started_target(args.model_dir, args.serve_flags) as started:
        yield started


@contextmanager
def started_target(model_dir: str | None, serve_flags: Sequence[str]) -> Iterator[Target]:
    """Yields a server on free ports, started here and stopped with the block; the demo model's without `model_dir`."""
    ports = free_ports(3)
    # Without the gateway: it is not what these benchmarks measure, and its port may be taken.
    command = [str(Path(sys.executable).with_name("wavetrain")), "serve", "--no-gateway"]
    command += [model_dir] if model_dir is not None else []
    for flag, port in zip(("--http-port", "--grpc-port", "--metrics-port"), ports, strict=True):
        command += [flag, str(port)]
    with _started([*command, *serve_flags]) as pid:
        yield Target(url=f"127.0.0.1:{ports[1]}", served=Path(model_dir).name if model_dir else "demo", pid=pid)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[int]:
    REPORTS.mkdir(exist_ok=True)
    log = REPORTS / "bench_server.log"
    print(f"starting: {' '.join(command)}   (log: {log.relative_to(ROOT)})", file=sys.stderr)
    with log.open("w", encoding="utf-8") as sink:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
        try:
            _wait_until_ready(server, log)
            yield server.pid
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(server: subprocess.Popen[str], log: Path) -> None:
    if server.stdout is None:
        raise SystemExit("the server was started without a pipe")
    for line in server.stdout:
        if "wavetrain: ready" in line:
            return
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise SystemExit(f"the server ended before it was ready:\n{tail}")


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on at this moment."""
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the value that `percent` of the values do not exceed; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def where_measured() -> dict[str, object]:
    """Returns the machine, the versions and the commit, for each line of results."""
    return {
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "tritonclient": version("tritonclient"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
