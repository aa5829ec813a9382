# SPDX-License-Identifier: Apache-2.0
"""The real Triton server as a child process of a test, on free ports, with a model repository of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavetrain_cli.triton_server import ServerOptions, command_line, find_triton_server, server_environment
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.ipc.core_stats import read_stats
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.stats import EngineStats

REPOSITORY = Path(__file__).parents[2] / "model_repository"
MODELS = ("tokenizer", "engine", "detokenizer", "ensemble", "llm")
_START_TIMEOUT_S = 90.0


@dataclass
class RunningServer:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    repository: Path
    log_path: Path
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def runtime_dir(self) -> RuntimeDir:
        return RuntimeDir.of_server(self.repository / "engine" / "1" / "engine.toml", self.process.pid)

    def stats(self) -> EngineStats:
        return read_stats(self.runtime_dir)

    def wait_until_idle(self, timeout_s: float) -> EngineStats:
        """Returns the first counters without a request; the last ones seen after the time-out."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            stats = self.stats()
            if stats.num_running + stats.num_waiting == 0 or time.monotonic() > deadline_s:
                return stats
            time.sleep(0.02)

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def make_repository(out: Path, model_dir: Path, **flags: Any) -> Path:
    """Copies the committed model repository and binds it to a checkpoint with these engine options."""
    for name in MODELS:
        shutil.copytree(REPOSITORY / name, out / name, ignore=shutil.ignore_patterns("demo*", "__pycache__", "*.toml"))
    config = EngineConfig.from_flags({"model": str(model_dir), **flags})
    (out / "engine" / "1" / "engine.toml").write_text(config.to_toml(), encoding="utf-8")
    return out


@contextmanager
def start_server(repository: Path, work_dir: Path) -> Iterator[RunningServer]:
    """Runs a server on `repository` until the block ends; the log stays in `work_dir`."""
    http_port, grpc_port, metrics_port = _free_ports(3)
    found = find_triton_server(work_dir / "cache")
    options = ServerOptions(
        model_repository=repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        exit_timeout_s=10,
        shm_prefix=f"wt{os.getpid()}_{http_port}",
    )
    log_path = work_dir / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command_line(found, options), env=server_environment(found, os.environ), stdout=log, stderr=log
        )
    server = RunningServer(process, repository, log_path, http_port, grpc_port, metrics_port)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: RunningServer) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log()[-8000:]}")
        try:
            with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server is not ready after {_START_TIMEOUT_S} s:\n{server.log()[-8000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
