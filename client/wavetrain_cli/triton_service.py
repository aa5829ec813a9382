# SPDX-License-Identifier: Apache-2.0
"""What the supervisor asks of a running server: by HTTP whether it is ready, of its engine core whether it is idle.

Draining talks to the engine core, because Triton 2.51 has no way to refuse new requests while gRPC streams go on.
"""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavetrain_engine.ipc.drain_client import DrainClient

_TIMEOUT_S = 2.0


class TritonService:
    """One server, by its HTTP address and its engine.toml. Implements the supervisor's Service."""

    def __init__(self, *, host: str, http_port: int, engine_config: Path) -> None:
        self._host = host
        self._http_port = http_port
        self._engine_config = engine_config
        self._drain: DrainClient | None = None

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self._host, self._http_port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except OSError:  # not listening yet
            return False
        except http.client.HTTPException:
            return False
        finally:
            connection.close()

    def begin_drain(self, server_pid: int) -> None:
        # Imported here: msgspec costs time that a start does not need.
        from wavetrain_engine.ipc.drain_client import DrainClient

        self._drain = DrainClient.of_server(self._engine_config, server_pid)

    def is_idle(self) -> bool:
        return self._drain is None or self._drain.is_idle()


def local_host(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def example_request(*, host: str, http_port: int, prompt: str) -> str:
    """A curl command that streams a completion; it works when pasted into a shell."""
    return _curl(host, http_port, "llm", {"text_input": prompt, "max_tokens": 32, "stream": True})


def example_token_request(*, host: str, http_port: int) -> str:
    """The same for an engine without a tokenizer: token ids in, token ids out."""
    body = {"input_ids": [1, 2, 3], "input_lengths": 3, "request_output_len": 32, "streaming": True}
    return _curl(host, http_port, "engine", body)


def _curl(host: str, http_port: int, model: str, body: dict[str, Any]) -> str:
    name = f"[{host}]" if ":" in host else host
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"curl -sN http://{name}:{http_port}/v2/models/{model}/generate_stream -d '{quoted}'"
