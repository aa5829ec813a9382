# SPDX-License-Identifier: Apache-2.0
"""The client's error tree, and messages of the wire → classes."""

from __future__ import annotations

import inspect

import pytest

import wavetrain_client
from wavetrain_client import errors
from wavetrain_client.channel import CHANNEL_OPTIONS, Address
from wavetrain_client.errors import (
    Cancelled,
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerBusy,
    ServerFailed,
    StreamBroken,
    error_from_message,
    error_from_status,
)
from wavetrain_client.retry import MAX_DELAY_S, RetryPolicy


@pytest.mark.parametrize(
    ("message", "kind", "word", "text"),
    [
        ("invalid: top_p must be at most 1", RequestRejected, "invalid", "top_p must be at most 1"),
        ("not_found: no such adapter", RequestRejected, "not_found", "no such adapter"),
        ("busy: the queue is full", ServerBusy, "busy", "the queue is full"),
        ("cancelled: stopped", Cancelled, "cancelled", "stopped"),
        ("deadline: too late", DeadlineExceeded, "deadline", "too late"),
        ("dead: the engine is gone", ServerFailed, "dead", "the engine is gone"),
        ("internal: NaN logits", ServerFailed, "internal", "NaN logits"),
        ("in ensemble 'ensemble', busy: full", ServerBusy, "busy", "full"),
        ("[request id: a] in ensemble 'e', invalid: a\nb", RequestRejected, "invalid", "a\nb"),
        ("Request for unknown model: 'x' is not found", RequestRejected, "not_found", None),
        ("unexpected inference input 'zz' for model 'llm'", RequestRejected, "invalid", None),
        ("[request id: abc] expected number of inputs between 1 and 2 but got 0", RequestRejected, "invalid", None),
        ("[request id: a] inference input 'x' data-type is 'INT32', but", RequestRejected, "invalid", None),
        ("Stub process 'llm_0_0' is not healthy.", ServerFailed, "dead", None),
        ("weird: something else", ServerFailed, "internal", "weird: something else"),
        ("", ServerFailed, "internal", ""),
    ],
)
def test_the_first_word_decides_the_class(message, kind, word, text):
    error = error_from_message(message)
    assert type(error) is kind
    assert error.word == word
    if text is not None:
        assert str(error) == text


@pytest.mark.parametrize(
    ("code", "details", "has_started", "kind"),
    [
        ("INTERNAL", "Internal error from Core", False, ConnectionFailed),
        ("INTERNAL", "Received RST_STREAM with error code 2", False, ConnectionFailed),
        ("INTERNAL", "Internal error from Core", True, StreamBroken),
        ("INTERNAL", "Stub process 'llm_0_0' crashed", False, ServerFailed),
        ("UNAVAILABLE", "connection refused", False, ConnectionFailed),
        ("UNAVAILABLE", "connection reset", True, StreamBroken),
        ("UNAVAILABLE", "busy: the queue is full", False, ServerBusy),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", True, DeadlineExceeded),
        ("CANCELLED", "shutting down", False, Cancelled),
        ("CANCELLED", "shutting down", True, StreamBroken),
        ("UNIMPLEMENTED", "unknown service", False, ConnectionFailed),
        ("INVALID_ARGUMENT", "bad", False, RequestRejected),
        ("RESOURCE_EXHAUSTED", "message too large", False, RequestRejected),
        ("NOT_FOUND", "no", False, RequestRejected),
        ("INTERNAL", "boom", False, ServerFailed),
    ],
)
def test_a_failed_call_becomes_an_error(code, details, has_started, kind):
    assert type(error_from_status(code, details, url="127.0.0.1:1", has_started=has_started)) is kind


def test_a_refused_connection_says_where_and_what_to_do():
    message = str(error_from_status("UNAVAILABLE", "refused", url="127.0.0.1:8001", has_started=False))
    assert "127.0.0.1:8001" in message
    assert "is it started" in message


def test_every_word_has_a_class_and_every_class_a_known_word():
    assert set(errors.ERROR_CLASSES) == {"invalid", "not_found", "busy", "cancelled", "deadline", "dead", "internal"}
    leaves = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, ClientError)]
    assert {kind.default_word for kind in leaves} <= set(errors.ERROR_CLASSES)


def test_exports_are_sorted_and_complete():
    assert wavetrain_client.__all__ == sorted(wavetrain_client.__all__)
    modules = {name for name, value in vars(wavetrain_client).items() if inspect.ismodule(value)}
    public = {name for name in vars(wavetrain_client) if not name.startswith("_")} - modules
    assert public == set(wavetrain_client.__all__)


def test_only_busy_and_unreached_servers_are_asked_again():
    policy = RetryPolicy(max_retries=2)
    for error in (ServerBusy("x"), ConnectionFailed("x")):
        assert 0.1 <= (policy.delay_s(error, 1) or 0) <= 0.2
        assert 0.2 <= (policy.delay_s(error, 2) or 0) <= 0.4
        assert policy.delay_s(error, 3) is None
    for error in (RequestRejected("x"), Cancelled("x"), DeadlineExceeded("x"), StreamBroken("x"), ServerFailed("x")):
        assert policy.delay_s(error, 1) is None
    assert (RetryPolicy(max_retries=50).delay_s(ServerBusy("x"), 40) or 0) <= MAX_DELAY_S
    with pytest.raises(ValueError, match="max_retries"):
        RetryPolicy(max_retries=-1)


def test_addresses():
    assert Address.parse("localhost:8001") == Address("localhost:8001", is_secure=False)
    assert Address.parse("grpc://[::1]:8001") == Address("[::1]:8001", is_secure=False)
    assert Address.parse("grpcs://llm.example:443") == Address("llm.example:443", is_secure=True)
    for url in ("localhost", "localhost:x", "ftp://a:1", "", "grpc://a:1/v2", ":8001"):
        with pytest.raises(ValueError, match="no server address"):
            Address.parse(url)
    with pytest.raises(ValueError, match="speaks gRPC, on port 8001"):
        Address.parse("http://localhost:8000")


def test_pings_stay_rarer_than_the_triton_server_allows():
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] > 300_000
    assert options["grpc.keepalive_permit_without_calls"] == 0
    assert options["grpc.max_receive_message_length"] == 2**31 - 1
