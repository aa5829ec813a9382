# SPDX-License-Identifier: Apache-2.0
"""`wavetrain serve` over the real Triton server: ready, drained, killed, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from fakes.checkpoint_files import write_checkpoint
from wavetrain_cli.repository import packaged_repository

pytestmark = pytest.mark.server

START_TIMEOUT_S = 60.0
NUM_TOKENS = 200


class Served:
    """A running `wavetrain serve`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.http_port, grpc_port, metrics_port, self.gateway_port = free_ports(4)
        self.output, self.errors = folder / "stdout", folder / "stderr"
        self.http = httpx.Client(verify=False, timeout=START_TIMEOUT_S)  # without TLS: its set-up alone takes 30 ms
        ports = [f"--http-port={self.http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
        ports.append(f"--gateway-port={self.gateway_port}")
        with self.output.open("w") as stdout, self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wavetrain_cli.main", "serve", *ports, *arguments],
                stdout=stdout,
                stderr=stderr,
                env=os.environ | {"WAVETRAIN_CACHE_DIR": str(folder / "cache")},
                cwd=folder,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/v2/models/llm"

    def wait_until_ready(self) -> None:
        wait_for(lambda: "wavetrain: ready" in self.output.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.errors.read_text()

    def processes(self) -> list[psutil.Process]:
        """Everything below the command: server, stubs, engine core."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def server(self) -> psutil.Process:
        return next(item for item in self.processes() if Path(item.exe()).name == "tritonserver")

    def core(self) -> psutil.Process:
        return next(item for item in self.processes() if "wavetrain_engine.core_process" in item.cmdline())

    def gateway(self) -> psutil.Process:
        return next(item for item in self.processes() if "gateway" in item.cmdline())

    def complete(self) -> httpx.Response:
        body = {"model": "demo", "prompt": "def f(", "max_tokens": 4}
        return self.http.post(f"http://127.0.0.1:{self.gateway_port}/v1/completions", json=body)

    def is_gateway_ready(self) -> bool:
        try:
            return self.http.get(f"http://127.0.0.1:{self.gateway_port}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def is_ready(self) -> bool:
        try:
            return self.http.get(f"http://127.0.0.1:{self.http_port}/v2/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def generate(self, max_tokens: int) -> httpx.Response:
        body = {"text_input": "def f(", "stream": False, "max_tokens": max_tokens}
        return self.http.post(f"{self.url}/generate", json=body)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: str) -> Served:
        started.append(Served(tmp_path, *arguments))
        return started[-1]

    yield start
    for item in started:
        item.http.close()
        item.process.kill()
        item.process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that ended and that init has not collected yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(is_true: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_printed_curl_command_streams_and_ctrl_c_lets_the_stream_finish(serve: Callable[..., Served]) -> None:
    running = serve("--grace-s", "200")
    running.wait_until_ready()
    (line,) = running.output.read_text().splitlines()
    command = shlex.split(re.search(r"curl .*", line)[0])  # type: ignore[index]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.startswith("data: ")
    assert "text_output" in done.stdout

    body = {
        "text_input": "def __init__(self",
        "stream": True,
        "sampling_parameters": json.dumps({"max_tokens": NUM_TOKENS, "ignore_eos": True}),
        "return_num_output_tokens": True,
    }
    below, num_tokens, refusal = running.processes(), 0, None
    with running.http.stream("POST", f"{running.url}/generate_stream", json=body) as response:
        for event in response.iter_lines():
            if not event.startswith("data: "):
                continue
            chunk = json.loads(event[len("data: ") :])
            assert "error" not in chunk
            num_tokens += chunk["num_output_tokens"]
            if refusal is None:
                running.process.send_signal(signal.SIGINT)
                wait_for(lambda: "draining" in running.errors.read_text())
                refusal = wait_for_refusal(running)
    assert num_tokens == NUM_TOKENS
    assert refusal is not None
    assert "busy: " in refusal
    assert running.process.wait(START_TIMEOUT_S) == 0
    assert [item for item in below if is_alive(item)] == []


def wait_for_refusal(running: Served) -> str:
    """Sends requests until the drain, which crosses two processes, refuses one."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (response := running.generate(max_tokens=1)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return response.text


def test_a_killed_server_is_back_within_30_s_without_its_old_core(serve: Callable[..., Served]) -> None:
    running = serve()
    running.wait_until_ready()
    server, core, gateway = running.server(), running.core(), running.gateway()
    assert running.complete().json()["choices"][0]["text"]
    server.kill()
    wait_for(lambda: "the server is back" in running.errors.read_text(), timeout_s=30)
    assert running.is_ready()
    assert not is_alive(core)
    assert not is_alive(server)
    cores = [item for item in running.processes() if "wavetrain_engine.core_process" in item.cmdline()]
    assert len(cores) == 1
    assert "SIGKILL" in running.errors.read_text()
    assert running.generate(max_tokens=4).status_code == 200
    # The gateway has stayed, and finds the new server.
    wait_for(lambda: running.complete().status_code == 200)
    assert running.gateway().pid == gateway.pid
    gateway.kill()
    wait_for(lambda: "the gateway ended" in running.errors.read_text())
    wait_for(lambda: running.is_gateway_ready())

    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(START_TIMEOUT_S) == 0
    assert not is_alive(cores[0])
    assert not running.is_gateway_ready()


def test_nothing_survives_a_killed_command(serve: Callable[..., Served]) -> None:
    # With a checkpoint and a flag, so that a repository of its own is built.
    running = serve(str(packaged_repository() / "engine" / "1" / "demo"), "--max-num-seqs=2")
    running.wait_until_ready()
    assert running.generate(max_tokens=4).status_code == 200
    below = running.processes()
    assert len(below) >= 3
    running.process.kill()
    running.process.wait()
    wait_for(lambda: not any(is_alive(item) for item in below), timeout_s=30)


def test_the_second_start_is_ready_within_10_s(serve: Callable[..., Served]) -> None:
    first = serve()
    first.wait_until_ready()  # with kernels to compile
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(START_TIMEOUT_S) == 0
    begin = time.monotonic()
    serve().wait_until_ready()
    assert time.monotonic() - begin < 10


def test_a_checkpoint_that_cannot_load_is_one_line(serve: Callable[..., Served], tmp_path: Path) -> None:
    # The headers are sound; that tensors are missing is found by the engine.
    running = serve(str(write_checkpoint(tmp_path / "model")))
    assert running.process.wait(START_TIMEOUT_S) == 1
    assert running.output.read_text() == ""
    lines = running.errors.read_text().splitlines()
    assert [line for line in lines if "model.embed_tokens.weight" in line] == [lines[-1]]
    assert lines[-1].startswith("wavetrain: ")
    assert "Traceback" not in running.errors.read_text()
