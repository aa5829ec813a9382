# SPDX-License-Identifier: Apache-2.0
"""The gateway's settings: gateway.toml and the command line, checked once, never changed.

Every default is here. Sections that belong to one file are defined there and only named here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from wavetrain_gateway.limits.assembly import KeySettings
from wavetrain_gateway.routing.settings import RoutingSettings
from wavetrain_gateway.toml_file import parse_file

DEFAULT_PORT = 9000

_Seconds = Annotated[float, Field(gt=0, le=86_400)]
_Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A table of gateway.toml: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ListenSettings(Section):
    """Where the gateway listens.

    Attributes:
        header_timeout_s: from the connection, or the first byte of a later request, to its last header.
        keep_alive_s: how long a connection may wait for its next request.
        drain_timeout_s: after SIGTERM, how long running requests may go on.
        allowed_origins: web origins whose pages may call the API (CORS); none by default.
        allowed_hosts: names beside loopback's own that a gateway on loopback without keys answers to.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    header_timeout_s: _Seconds = 60.0
    keep_alive_s: _Seconds = 75.0
    drain_timeout_s: float = Field(default=30.0, ge=0, le=86_400)
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()


class CapSettings(Section):
    """The most a request may ask for or bring along.

    Attributes:
        max_body_bytes: of a body or a WebSocket frame; parsing holds the event loop, up to 30 ms for 1 MiB.
        max_choices: `n`, and `best_of`.
        max_prompts: prompts in one completion request.
        max_sequences: prompts times choices.
        max_running_prompts: of one request at the same time; the others wait.
        max_output_tokens: what a chat request that names no limit may generate, within the model's context.
    """

    max_body_bytes: int = Field(default=1 << 20, ge=1024, le=256 << 20)
    max_header_bytes: int = Field(default=32 << 10, ge=1024, le=1 << 20)
    max_choices: int = Field(default=16, ge=1, le=128)
    max_prompts: _Count = 256
    max_sequences: _Count = 256
    max_running_prompts: _Count = 32
    max_stop_strings: int = Field(default=16, ge=1, le=64)
    max_stop_chars: int = Field(default=256, ge=1, le=1024)
    max_logit_biases: int = Field(default=1024, ge=1, le=4096)
    max_top_logprobs: int = Field(default=20, ge=0, le=100)
    max_messages: _Count = 2048
    max_output_tokens: int = Field(default=131_072, ge=1, le=2**31 - 1)

    @property
    def max_sizes(self) -> dict[str, int]:
        """Of lists whose elements are dear to check: what is looked at before they are."""
        return {"messages": self.max_messages}


class FlowSettings(Section):
    """Time limits and buffers of a running request.

    Attributes:
        body_timeout_s: from the headers to the last byte of the body.
        queue_timeout_s: from the request to its first token; then it is refused with 503.
        total_timeout_s: the most a request may take, and what one takes that names no limit of its own.
        write_timeout_s: how long a reader may take nothing before the request is cancelled.
        ping_interval_s: how often a silent stream gets a comment, so that proxies keep it.
        max_buffered_chars: text that waits for a slow reader; beyond it the model's stream waits too.
        resume_s: how long a WebSocket's events can be asked for again after the connection broke.
        max_socket_requests: running requests of one WebSocket.
    """

    body_timeout_s: _Seconds = 30.0
    queue_timeout_s: _Seconds = 120.0
    total_timeout_s: _Seconds = 600.0
    write_timeout_s: _Seconds = 30.0
    ping_interval_s: _Seconds = 15.0
    max_buffered_chars: int = Field(default=1 << 20, ge=1024)
    resume_s: _Seconds = 60.0
    max_socket_requests: _Count = 64


class LogSettings(Section):
    """What is logged. Texts of prompts and answers never are."""

    access_log: bool = True
    level: str = Field(default="info", pattern="^(debug|info|warning|error)$")


class CacheSettings(Section):
    """The response cache: exact repeats of deterministic requests.

    Attributes:
        redis_url: share it between gateways; in memory without.
        is_shared: answers of one key may be given to another; only where the key is not kept apart by a salt.
    """

    is_enabled: bool = False
    ttl_s: _Seconds = 300.0
    max_bytes: int = Field(default=64 << 20, ge=1 << 10)
    max_entry_bytes: int = Field(default=1 << 20, ge=1 << 10)
    redis_url: str | None = None
    is_shared: bool = False


class TraceSettings(Section):
    """OpenTelemetry traces (the extra `otel`); off without an endpoint.

    Attributes:
        otlp_endpoint: the collector's address, "http://host:4318/v1/traces".
        sample_ratio: share of the traces that begin here; one that comes with a `traceparent` decides itself.
    """

    otlp_endpoint: Annotated[str, Field(pattern="^https?://")] | None = None
    sample_ratio: float = Field(default=1.0, ge=0, le=1)


class AdminSettings(Section):
    """The admin API, on a listener of its own; off without a port. Its key comes from WAVETRAIN_ADMIN_KEY."""

    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=0, le=65535)


class GatewaySettings(Section):
    """Everything.

    Attributes:
        upstreams: the replicas of `model`, unless `routing.file` says more.
        engine_metrics: metrics pages of Triton servers, for GET /load and the page's charts.
    """

    upstreams: tuple[str, ...] = ("127.0.0.1:8001",)
    engine_metrics: tuple[Annotated[str, Field(pattern="^https?://")], ...] = ()
    model: str = Field(default="wavetrain", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")
    listen: ListenSettings = ListenSettings()
    caps: CapSettings = CapSettings()
    flow: FlowSettings = FlowSettings()
    log: LogSettings = LogSettings()
    cache: CacheSettings = CacheSettings()
    trace: TraceSettings = TraceSettings()
    keys: KeySettings = KeySettings()
    routing: RoutingSettings = RoutingSettings()
    admin: AdminSettings = AdminSettings()

    @classmethod
    def read(cls, path: Path) -> GatewaySettings:
        """Reads gateway.toml.

        Raises:
            FileError: it is no TOML, or has a key or a value that cannot be; the message says which.
            OSError: it cannot be read.
        """
        return parse_file(path.read_bytes(), path.name, cls)
