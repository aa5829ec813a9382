# SPDX-License-Identifier: Apache-2.0
"""A fake replica in a process of its own, to be killed: `python -m fakes.replica_process`, as a test's child.

It streams `w0 w1 w2 ...`, max_tokens words, one every 2 ms. A prompt that begins with "stall" gets no first word, one
with "hang" no second, until the process is told to go on by SIGUSR1. Its first line of output is its port.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fakes.replicas import FakeReplica
from fakes.triton import ReceivedRequest, reply, serve

_TESTS = Path(__file__).parents[1]


class ReplicaProcess:
    """The test's side: a running replica."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.url = f"127.0.0.1:{port}"

    def kill(self) -> None:
        """As the kernel does it."""
        self.process.kill()
        self.process.wait()

    def go_on(self) -> None:
        """Ends all stalls, those to come as well."""
        self.process.send_signal(signal.SIGUSR1)


@contextmanager
def replica_processes(count: int) -> Iterator[list[ReplicaProcess]]:
    """Runs so many replicas until the block ends."""
    command = [sys.executable, "-m", "fakes.replica_process"]
    environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=_TESTS) for _ in range(count)
    ]
    try:
        replicas: list[ReplicaProcess] = []
        for child in children:
            assert child.stdout is not None
            replicas.append(ReplicaProcess(child, int(child.stdout.readline())))
        yield replicas
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


async def _main() -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)

    async def stream(request: ReceivedRequest) -> AsyncIterator[Any]:
        prompt = request.inputs["text_input"][0]
        max_tokens = json.loads(request.inputs["sampling_parameters"][0])["max_tokens"]
        for number in range(max_tokens):
            if (number == 0 and prompt.startswith(b"stall")) or (number == 1 and prompt.startswith(b"hang")):
                await told.wait()
            yield reply(f"w{number} ", "length" if number == max_tokens - 1 else None)
            await asyncio.sleep(0.002)

    async with serve(FakeReplica(stream)) as fake:
        sys.stdout.write(f"{fake.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
