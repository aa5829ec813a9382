# SPDX-License-Identifier: Apache-2.0
"""A real redis-server on a Unix socket, where one is installed, and connections to a pretended one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from redis.asyncio import BlockingConnectionPool


@contextmanager
def redis_server(work_dir: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Yields the address of a redis-server and its process, or skips the test."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed; what can be tested without it is tested on fakeredis")
    path = work_dir / "redis"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=work_dir)
    try:
        while not _listens(path):
            assert process.poll() is None
            time.sleep(0.01)
        yield f"unix://{path}", process
    finally:
        process.kill()
        process.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def fake_pool(server: fakeredis.FakeServer) -> BlockingConnectionPool:
    """Connections to a pretended server; one for each gateway that shares it."""
    connections: dict[str, Any] = {"connection_class": fakeredis.FakeAsyncRedisConnection, "server": server}
    return BlockingConnectionPool(max_connections=16, timeout=None, **connections)
