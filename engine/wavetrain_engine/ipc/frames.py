# SPDX-License-Identifier: Apache-2.0
"""What the models and the core say to each other: msgpack messages, typed, never pickle.

A client (a Triton model's process) connects and says Hello. While the engine loads it hears Progress, then
Ready with the engine's facts, or LoadFailed. From then on it sends commands (Add, Cancel); each step of the
engine answers with at most one Updates message per client, carrying the news of all its requests; with fewer
while the client asks for it by Hold.
"""

from __future__ import annotations

import msgspec

from wavetrain_engine.command import Add, Cancel
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.request import RequestUpdate
from wavetrain_engine.stats import EngineStats

PROTOCOL_VERSION = 3


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A client attaches; `pid` is its process. The core cancels its requests once the connection has ended."""

    pid: int
    protocol_version: int = PROTOCOL_VERSION


class GetStats(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Ask for the engine's counters; the answer bears the same ticket and comes between two steps."""

    ticket: int


class Drain(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Refuse new requests from now on, whoever sends them; running ones are finished."""


class Hold(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Until this `time.monotonic()` the client can wait for news that are neither a request's first nor its end."""

    until_s: float


class Goodbye(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The client leaves: its requests are cancelled, and nothing more is sent to it."""


class Progress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine is loading."""

    phase: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine is loaded and takes requests."""

    core_pid: int
    facts: EngineFacts


class LoadFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine cannot be loaded, and would fail again: the core exits after this."""

    code: ErrorCode
    message: str


class Updates(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The news of one step for one client."""

    updates: list[RequestUpdate]


class Stats(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine's counters, for the GetStats with this ticket."""

    ticket: int
    stats: EngineStats


ClientFrame = Hello | Add | Cancel | Hold | GetStats | Drain | Goodbye
CoreFrame = Progress | Ready | LoadFailed | Updates | Stats

_ENCODER = msgspec.msgpack.Encoder()
_CLIENT_DECODER: msgspec.msgpack.Decoder[ClientFrame] = msgspec.msgpack.Decoder(ClientFrame)
_CORE_DECODER: msgspec.msgpack.Decoder[CoreFrame] = msgspec.msgpack.Decoder(CoreFrame)


def encode(frame: ClientFrame | CoreFrame) -> bytes:
    """Turns a frame into one message."""
    return _ENCODER.encode(frame)


def decode_client_frame(message: bytes) -> ClientFrame:
    """Reads what a client sent.

    Raises:
        msgspec.DecodeError: not a frame of this protocol.
    """
    return _CLIENT_DECODER.decode(message)


def decode_core_frame(message: bytes) -> CoreFrame:
    """Reads what the core sent.

    Raises:
        msgspec.DecodeError: not a frame of this protocol.
    """
    return _CORE_DECODER.decode(message)
