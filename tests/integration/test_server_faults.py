# SPDX-License-Identifier: Apache-2.0
"""The engine core dies under load on the real server: every stream is told, the server lives, the core comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as grpc_aio
from safetensors.torch import load_file, save_file

from fakes.tiny_checkpoints import make_tiny_checkpoint
from fakes.triton_calls import Stream, generate, open_stream, read
from fakes.triton_server import RunningServer, make_repository, start_server
from wavetrain_engine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.server

# Far above what a step of the demo model takes, on a busy machine too.
_STEP_TIMEOUT_S = 5.0
_LONG = {"text_input": "import os\n", "max_tokens": 1500, "end_id": -1, "stream": True}


@pytest.fixture
def own_server(served_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    flags = {"num_blocks": 1024, "max_num_seqs": 64, "step_timeout_s": _STEP_TIMEOUT_S}
    repository = make_repository(tmp_path / "repository", served_model, **flags)
    with start_server(repository, tmp_path) as server:
        yield server


async def test_killed_core_ends_streams_and_comes_back(own_server: RunningServer) -> None:
    core_pid = own_server.runtime_dir.running_core()
    assert core_pid is not None
    async with grpc_aio.InferenceServerClient(own_server.grpc_url) as client:
        calls = [await open_stream(client, "llm" if index % 2 else "ensemble", _LONG) for index in range(8)]
        streams = await asyncio.gather(*(read(call, Stream(), at_most=2) for call in calls))
        os.kill(core_pid, signal.SIGKILL)
        killed_s = time.monotonic()
        await asyncio.wait_for(
            asyncio.gather(*(read(call, stream) for call, stream in zip(calls, streams, strict=True))), 5
        )
        for index, stream in enumerate(streams):
            prefix = "" if index % 2 else "in ensemble 'ensemble', "
            assert stream.errors == [f"{prefix}dead: the engine core died; send the request again"]
    await check_that_it_is_back(own_server, core_pid, killed_s)


async def test_core_that_hangs_is_ended_and_comes_back(own_server: RunningServer) -> None:
    core_pid = own_server.runtime_dir.running_core()
    assert core_pid is not None
    async with grpc_aio.InferenceServerClient(own_server.grpc_url) as client:
        calls = [await open_stream(client, "llm" if index % 2 else "ensemble", _LONG) for index in range(4)]
        streams = await asyncio.gather(*(read(call, Stream(), at_most=2) for call in calls))
        os.kill(core_pid, signal.SIGSTOP)
        await asyncio.wait_for(
            asyncio.gather(*(read(call, stream) for call, stream in zip(calls, streams, strict=True))),
            4 * _STEP_TIMEOUT_S,
        )
        for stream in streams:
            (error,) = stream.errors
            # One of the models is the first to notice; for the others the core then has died.
            assert "dead: the engine core did not finish a step" in error or "dead: the engine core died" in error
    await check_that_it_is_back(own_server, core_pid, time.monotonic())


async def check_that_it_is_back(own_server: RunningServer, core_pid: int, since_s: float) -> None:
    """The server has lived on, and answers with a new core within 15 s."""
    assert own_server.process.poll() is None
    while True:
        assert time.monotonic() - since_s < 15
        stream = await generate(own_server.grpc_url, "llm", _LONG | {"max_tokens": 4})
        if not stream.errors:
            break
        # Refused at once, not left waiting.
        assert stream.errors == ["dead: the engine core is restarting; try again"]
        await asyncio.sleep(0.2)
    assert stream.chunks[-1].is_final
    assert own_server.runtime_dir.running_core() not in {None, core_pid}
    assert own_server.stats().num_blocks_used == 0


@pytest.fixture
def poisoned(tmp_path: Path) -> tuple[Path, int]:
    """A checkpoint whose embedding of the token "~" is NaN, and that token: a sequence with it has NaN logits."""
    directory = make_tiny_checkpoint(tmp_path / "poisoned")
    (token_id,) = Tokenizer.load(directory).encode("~", add_special_tokens=False)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, token_id


async def test_nan_in_one_of_several_sequences_ends_their_request_alone(
    poisoned: tuple[Path, int], tmp_path: Path
) -> None:
    directory, token_id = poisoned
    repository = make_repository(tmp_path / "repository", directory, num_blocks=64, max_num_seqs=8)
    prompts = np.array([[b"import os"], [b"import ~"]], dtype=np.object_)
    rows = {"text_input": prompts, "max_tokens": np.full((2, 1), 64, dtype=np.int32)}
    likely = {"n": 3, "seed": 5, "max_tokens": 64, "temperature": 1.0, "logit_bias": {str(token_id): 4.0}}
    good = {"text_input": "import os", "max_tokens": 64, "end_id": -1}
    with start_server(repository, tmp_path) as server:
        beside = asyncio.create_task(generate(server.grpc_url, "llm", good))
        for model, inputs, options in (
            ("ensemble", rows, {"batched": True}),
            ("ensemble", rows | {"stream": np.array([[True], [True]])}, {"batched": True}),
            ("llm", {"text_input": "x", "sampling_parameters": json.dumps(likely)}, {}),
        ):
            stream = await generate(server.grpc_url, model, inputs, **options)
            assert len(stream.errors) == 1
            assert "internal: " in stream.errors[0]
            assert "stream" in inputs or not stream.chunks
        whole = await beside
        assert not whole.errors
        assert (await generate(server.grpc_url, "ensemble", good)).text == whole.text
        assert server.wait_until_idle(5).num_blocks_used == 0


def test_no_core_is_left_behind(served_model: Path, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository", served_model, num_blocks=64, max_num_seqs=4)
    with start_server(repository, tmp_path) as server:
        runtime_dir = server.runtime_dir
        core_pid = runtime_dir.running_core()
        assert core_pid is not None
        server.process.send_signal(signal.SIGKILL)
        deadline_s = time.monotonic() + 10
        while runtime_dir.running_core() is not None:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_broken_checkpoint_is_one_clear_line(served_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for source in served_model.iterdir():
        if source.name != "model.safetensors":
            (broken / source.name).symlink_to(source)
    repository = make_repository(tmp_path / "repository", broken, num_blocks=64)
    with pytest.raises(RuntimeError, match="the server ended"), start_server(repository, tmp_path):
        pass
    log = (tmp_path / "server.log").read_text(encoding="utf-8")
    assert "engine cannot be served: CheckpointError: " in log
    assert "TritonModelException: invalid: " in log
    assert "Traceback" not in log
