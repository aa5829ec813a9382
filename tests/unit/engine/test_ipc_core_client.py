# SPDX-License-Identifier: Apache-2.0
"""The client and the core process over a real socket, with a fake executor: attach, serve, die, come back, leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from fakes.core_process import COMMAND
from fakes.executor import sequential_output
from wavetrain_engine.errors import CheckpointError, EngineDead, ErrorCode
from wavetrain_engine.ipc.core_client import CoreClient, Sink
from wavetrain_engine.ipc.core_stats import main as print_stats
from wavetrain_engine.ipc.core_stats import read_stats
from wavetrain_engine.ipc.core_watchdog import CoreWatchdog
from wavetrain_engine.ipc.drain_client import DrainClient
from wavetrain_engine.ipc.process_watch import start_ticks
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams

PROMPT = [1, 2, 3]
Connect = Callable[..., CoreClient]


@pytest.fixture
def base() -> Iterator[Path]:
    # pytest's own folders are too deep for a socket's address.
    with tempfile.TemporaryDirectory(prefix="wt") as path:
        yield Path(path)


@pytest.fixture
def connect(base: Path, tmp_path: Path) -> Iterator[Connect]:
    """Makes clients of one core; the tests' process is their server too."""
    clients: list[CoreClient] = []

    def make(model: str = "echo", server_pid: int | None = None, **options: Any) -> CoreClient:
        config = tmp_path / f"{model}.toml"
        config.write_text(f'[model]\nmodel = "{model}"\n', encoding="utf-8")
        pid = server_pid or os.getpid()
        client = CoreClient(config, RuntimeDir.of_server(config, pid, base / "wavetrain"), pid, COMMAND, **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def request(request_id: str, max_tokens: int = 8) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id=request_id, prompt_token_ids=PROMPT, sampling_params=params)


def collect(updates: Queue[RequestUpdate], timeout_s: float = 10.0) -> tuple[list[int], RequestUpdate]:
    """All tokens up to the end, and the last update."""
    tokens: list[int] = []
    while True:
        update = updates.get(timeout=timeout_s)
        tokens += update.new_token_ids
        if update.finish_reason is not None:
            return tokens, update


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def to(sink: Sink) -> Callable[[], Sink]:
    """Has `submit` give the news to this sink."""
    return lambda: sink


def runtime_dir_of(client: CoreClient) -> RuntimeDir:
    return client._runtime_dir


def test_requests_get_their_own_updates(connect: Connect) -> None:
    client = connect()
    facts = client.start()
    queues: dict[str, Queue[RequestUpdate]] = {f"r{index}": Queue() for index in range(20)}
    for request_id, queue in queues.items():
        client.submit([request(request_id)], to(queue.put))
    params = request("x").sampling_params
    expected, _ = sequential_output(
        PROMPT, params, vocab_size=facts.vocab_size, max_model_len=facts.max_model_len, eos=()
    )
    for request_id, queue in queues.items():
        tokens, last = collect(queue)
        assert tokens == expected
        assert (last.request_id, last.finish_reason) == (request_id, FinishReason.LENGTH)
        assert queue.empty()


def test_refused_request_ends_with_its_error(connect: Connect) -> None:
    client = connect()
    client.start()
    updates: Queue[RequestUpdate] = Queue()
    bad = EngineRequest(request_id="bad", prompt_token_ids=[10**6], sampling_params=SamplingParams())
    client.submit([bad], to(updates.put))
    _, last = collect(updates)
    assert last.error_code is ErrorCode.INVALID


def test_news_wait_for_a_sink_that_is_still_made(connect: Connect) -> None:
    client, other = connect(), connect()
    client.start()
    other.start()
    updates: Queue[RequestUpdate] = Queue()

    def make_sink() -> Sink:
        wait_for(lambda: other.read_stats().num_requests_finished.get(FinishReason.LENGTH) == 1)
        return updates.put

    client.submit([request("r")], make_sink)
    assert len(collect(updates)[0]) == 8


def test_requests_end_where_no_sink_can_be_made(connect: Connect) -> None:
    client = connect()
    client.start()

    def make_sink() -> Sink:
        raise ValueError("no sink")

    with pytest.raises(ValueError, match="no sink"):
        client.submit([request("r", 4000)], make_sink)
    wait_for(lambda: client.read_stats().num_running == 0)
    updates: Queue[RequestUpdate] = Queue()
    client.submit([request("again")], to(updates.put))
    assert len(collect(updates)[0]) == 8


def test_second_client_attaches_to_the_same_core_and_the_last_ends_it(connect: Connect) -> None:
    first, second = connect(), connect()
    first.start()
    second.start()
    core_pid = first.core_pid
    assert core_pid is not None
    assert second.core_pid == core_pid
    first.close()
    assert start_ticks(core_pid) is not None
    updates: Queue[RequestUpdate] = Queue()
    second.submit([request("r")], to(updates.put))
    assert len(collect(updates)[0]) == 8
    second.close()
    assert start_ticks(core_pid) is None
    assert not runtime_dir_of(second).path.exists()


def test_cancel_ends_with_one_update(connect: Connect) -> None:
    client = connect()
    client.start()
    updates: Queue[RequestUpdate] = Queue()
    client.submit([request("r", 4000)], to(updates.put))
    updates.get(timeout=10)
    client.cancel(["r", "unknown"])
    _, last = collect(updates)
    assert (last.finish_reason, last.error_code) == (FinishReason.CANCELLED, None)
    wait_for(lambda: client.read_stats().num_blocks_used == 0)


def test_killed_core_ends_requests_at_once_and_is_restarted(connect: Connect) -> None:
    client = connect()
    client.start()
    updates: Queue[RequestUpdate] = Queue()
    client.submit([request("r", 4000)], to(updates.put))
    updates.get(timeout=10)
    core_pid = client.core_pid
    assert core_pid is not None
    os.kill(core_pid, signal.SIGKILL)
    _, last = collect(updates)
    assert (last.error_code, last.finish_reason) == (ErrorCode.DEAD, FinishReason.ERROR)
    wait_for(lambda: client.is_alive and client.core_pid != core_pid)
    client.submit([request("again")], to(updates.put))
    assert len(collect(updates)[0]) == 8
    assert updates.empty()


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_core_that_hangs_is_killed_and_restarted(connect: Connect, is_busy: bool) -> None:
    watched, other = connect(step_timeout_s=0.5), connect()
    watched.start()
    other.start()
    running: Queue[RequestUpdate] = Queue()
    updates: Queue[RequestUpdate] = Queue()
    core_pid = watched.core_pid
    assert core_pid is not None
    if is_busy:
        for index, client in enumerate((watched, other)):
            client.submit([request(f"r{index}", 4000)], to(running.put))
            running.get(timeout=10)
    os.kill(core_pid, signal.SIGSTOP)
    if is_busy:
        errors = {update.request_id: update for update in (collect(running)[1], collect(running)[1])}
        assert all(update.error_code is ErrorCode.DEAD for update in errors.values())
        assert (
            errors["r0"].error == "the engine core did not finish a step in time and is ended; send the request again"
        )
    for client in (watched, other):
        wait_for(lambda client=client: client.is_alive and client.core_pid != core_pid)
    assert start_ticks(core_pid) is None
    watched.submit([request("again")], to(updates.put))
    assert len(collect(updates)[0]) == 8


def test_core_that_loads_for_long_does_not_hang(connect: Connect) -> None:
    client = connect("slow", step_timeout_s=0.3)
    client.start()
    core_pid = client.core_pid
    assert client._num_crashes == 0
    updates: Queue[RequestUpdate] = Queue()
    client.submit([request("r", 1000)], to(updates.put))  # longer than a step may take, in many steps
    assert len(collect(updates)[0]) == 1000
    assert client.core_pid == core_pid


class TestWatchdog:
    class Clock:
        now_s = 0.0

        def __call__(self) -> float:
            return self.now_s

    def watch(self, limit_s: float) -> tuple[CoreWatchdog, Callable[[float], None]]:
        clock = self.Clock()
        watchdog = CoreWatchdog(limit_s, clock)

        def let_pass(time_s: float) -> None:
            for _ in range(round(time_s / 0.5)):
                clock.now_s += 0.5
                watchdog.tick()

        return watchdog, let_pass

    def test_asks_once_and_waits_for_the_limit(self) -> None:
        watchdog, let_pass = self.watch(60.0)
        let_pass(4.5)
        assert not watchdog.take_question()
        let_pass(0.5)
        assert [watchdog.take_question(), watchdog.take_question()] == [True, False]
        let_pass(60.0)
        assert not watchdog.is_hung
        let_pass(0.5)
        assert watchdog.is_hung
        watchdog.hear()
        assert not watchdog.is_hung
        let_pass(5.0)
        assert watchdog.take_question()

    def test_time_in_which_nobody_watched_does_not_count(self) -> None:
        watchdog, let_pass = self.watch(60.0)
        let_pass(5.0)
        assert watchdog.take_question()
        watchdog._last_tick_s -= 1000.0
        watchdog.tick()
        assert not watchdog.is_hung

    def test_without_a_limit_nothing_is_asked(self) -> None:
        watchdog, let_pass = self.watch(0.0)
        let_pass(1000.0)
        assert not watchdog.take_question()
        assert not watchdog.is_hung


def test_submit_while_there_is_no_core_is_refused_at_once(connect: Connect) -> None:
    client = connect()
    with pytest.raises(EngineDead, match="try again"):
        client.submit([request("r")], to(print))


def test_broken_checkpoint_reaches_start(connect: Connect) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint has no weights"):
        connect("broken").start()


def test_environment_that_means_nothing_reaches_start(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVETRAIN_LOG_LEVEL", "loud")
    with pytest.raises(CheckpointError, match="WAVETRAIN_LOG_LEVEL: expected one of debug, info"):
        connect().start()


def test_core_that_crashes_while_loading_is_given_up(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavetrain_engine.ipc.core_client._FIRST_RESTART_DELAY_S", 0.01)
    with pytest.raises(EngineDead, match="crashed while it loaded"):
        connect("crash").start()


def test_drain_refuses_new_requests_and_lets_running_ones_end(connect: Connect) -> None:
    client = connect()
    client.start()
    running: Queue[RequestUpdate] = Queue()
    refused: Queue[RequestUpdate] = Queue()
    client.submit([request("running", 200)], to(running.put))
    running.get(timeout=10)
    core_pid = client.core_pid
    assert core_pid is not None
    drain = DrainClient(runtime_dir_of(client).socket_path(core_pid), core_pid)
    try:
        wait_for(lambda: not drain.is_idle())
        client.submit([request("late")], to(refused.put))
        assert collect(refused)[1].error_code is ErrorCode.BUSY
        assert collect(running)[1].finish_reason is FinishReason.LENGTH
        wait_for(drain.is_idle)
    finally:
        drain.close()


def test_sigterm_cancels_what_runs(connect: Connect) -> None:
    client = connect()
    client.start()
    updates: Queue[RequestUpdate] = Queue()
    client.submit([request("r", 4000)], to(updates.put))
    updates.get(timeout=10)
    assert client.core_pid is not None
    os.kill(client.core_pid, signal.SIGTERM)
    assert collect(updates)[1].finish_reason is FinishReason.CANCELLED


def test_dead_client_has_its_requests_cancelled(connect: Connect, base: Path, tmp_path: Path) -> None:
    client = connect()
    client.start()
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from wavetrain_engine.ipc.core_client import CoreClient\n"
        "from wavetrain_engine.ipc.runtime_dir import RuntimeDir\n"
        "from wavetrain_engine.request import EngineRequest\n"
        "from wavetrain_engine.sampling_params import SamplingParams\n"
        "config, directory, pid = Path(sys.argv[1]), RuntimeDir(Path(sys.argv[2])), int(sys.argv[3])\n"
        "client = CoreClient(config, directory, pid)\n"
        "client.start()\n"
        "params = SamplingParams(max_tokens=4000, ignore_eos=True)\n"
        "request = EngineRequest(request_id='other', prompt_token_ids=[1], sampling_params=params)\n"
        "client.submit([request], lambda: lambda update: print('update', flush=True))\n"
        "input()\n"
    )
    arguments = [str(tmp_path / "echo.toml"), str(runtime_dir_of(client).path), str(os.getpid())]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"update\n"
        assert client.read_stats().num_running == 1
        child.kill()
        wait_for(lambda: client.read_stats().num_running == 0)
    stats = client.read_stats()
    assert stats.num_requests_finished == {FinishReason.CANCELLED: 1}
    assert stats.num_blocks_used == 0


def test_core_ends_with_its_server(connect: Connect) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        client = connect("echo", server.pid)
        client.start()
        core_pid = client.core_pid
        assert core_pid is not None
        server.kill()
        server.wait()
        wait_for(lambda: start_ticks(core_pid) is None)
        client.close()


def test_stats_from_outside(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    client = connect()
    client.start()
    directory = runtime_dir_of(client)
    assert read_stats(directory).num_blocks_total == 1024
    assert print_stats([str(directory.path)]) == 0
    assert "1024" in capsys.readouterr().out
