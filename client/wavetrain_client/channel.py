# SPDX-License-Identifier: Apache-2.0
"""Where the server is and how to hold the connection: the address and the gRPC channel's options."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

DEFAULT_URL = "127.0.0.1:8001"
_INT32_MAX = 2**31 - 1

# The Triton server takes two pings without data in five minutes as an attack and answers GOAWAY
# (--grpc-http2-min-recv-ping-interval-without-data=300000), so a ping goes out a little less often than that, and
# only while a request is running. It finds a peer that vanished without closing its connection.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", _INT32_MAX),
    ("grpc.max_receive_message_length", _INT32_MAX),
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # After a refused connection gRPC would not try again for 1 s, then longer, up to 2 min; a retry has to find a
    # server that is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Named oddly: it is the least time that one connection attempt gets.
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address: what gRPC dials, and whether by TLS."""

    target: str
    is_secure: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Reads `host:port`, `grpc://host:port` or `grpcs://host:port` (TLS).

        Raises:
            ValueError: another form; the message says what is expected.
        """
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme in {"http", "https"}:
            raise ValueError(
                f"{url!r} is an HTTP address; the client speaks gRPC, on port 8001 by default: 'host:8001'"
            )
        has_more = parts.path not in {"", "/"} or parts.query or parts.username
        if parts.scheme not in {"grpc", "grpcs"} or not parts.hostname or port is None or has_more:
            raise ValueError(f"{url!r} is no server address; expected 'host:port', or 'grpcs://host:port' for TLS")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(target=f"{host}:{port}", is_secure=parts.scheme == "grpcs")
