# SPDX-License-Identifier: Apache-2.0
"""The life of a request without a network: messages in, chunks, errors, delays and stop messages out."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.triton import ReceivedRequest, legacy_reply, reply, tensor_response
from wavetrain_client import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    GenerationRequest,
    RetryPolicy,
    ServerBusy,
    StreamBroken,
)
from wavetrain_client.protocol import to_message
from wavetrain_client.stream import StreamSession


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def new_session(*, max_retries: int = 2, clock: Any = None, **kwargs: Any) -> StreamSession:
    request = GenerationRequest(**{"prompt": "x", **kwargs})
    return StreamSession(
        request, url="host:1", retry_policy=RetryPolicy(max_retries), clock=clock if clock is not None else Clock()
    )


def test_chunks_come_out_and_a_finished_stream_adds_nothing():
    session = new_session()
    session.start_attempt()
    assert [chunk.text for chunk in session.receive(reply("a").infer_response)] == ["a"]
    assert session.receive(reply("b", "stop").infer_response)[0].finish_reason == "stop"
    assert session.finish() == []


def test_a_sequence_says_nothing_more_after_its_last_chunk():
    session = new_session(options={"n": 2})
    session.start_attempt()
    both = {"text_output": ("BYTES", [2], ["a", "b"]), "finish_reason": ("BYTES", [2], ["stop", "None"])}
    assert [chunk.sequence_index for chunk in session.receive(tensor_response(**both).infer_response)] == [0, 1]
    both = {"text_output": ("BYTES", [2], ["", "c"]), "finish_reason": ("BYTES", [2], ["None", "length"])}
    assert [chunk.sequence_index for chunk in session.receive(tensor_response(**both).infer_response)] == [1]
    assert session.finish() == []


def test_the_deadline_is_sent_and_shrinks_with_each_attempt():
    clock = Clock()
    session = new_session(clock=clock, timeout_s=2.0)
    sent, timeout_s = session.start_attempt()
    assert (timeout_s, sent.parameters["timeout_ms"]) == (2.0, 2000)
    clock.now_s += 1.5
    sent, timeout_s = session.start_attempt()
    assert (timeout_s, sent.parameters["timeout_ms"]) == (0.5, 500)
    clock.now_s += 0.5
    with pytest.raises(DeadlineExceeded):
        session.start_attempt()


def test_busy_is_retried_before_the_first_response_only():
    session = new_session()
    session.start_attempt()
    assert session.retry_delay_s(session.refuse("busy: full")) > 0
    session.start_attempt()
    session.receive(reply("a").infer_response)
    with pytest.raises(ServerBusy):
        session.retry_delay_s(session.refuse("busy: full"))


def test_retries_end_after_max_retries_and_never_pass_the_deadline():
    session = new_session(max_retries=1)
    assert session.retry_delay_s(ConnectionFailed("x")) > 0
    with pytest.raises(ConnectionFailed):
        session.retry_delay_s(ConnectionFailed("x"))
    with pytest.raises(ConnectionFailed):
        new_session(timeout_s=0.05).retry_delay_s(ConnectionFailed("x"))


def test_a_call_that_ends_too_early_is_broken():
    session = new_session()
    session.start_attempt()
    with pytest.raises(StreamBroken):
        session.finish()
    session = new_session()
    session.start_attempt()
    session.receive(reply("a").infer_response)
    with pytest.raises(StreamBroken):
        session.finish()


@pytest.mark.parametrize(("num_tokens", "reason"), [(5, "length"), (4, "stop")])
def test_a_legacy_stream_gets_its_finish_reason_from_the_number_of_tokens(num_tokens, reason):
    session = new_session(model="ensemble", options={"max_tokens": 5})
    session.start_attempt()
    for _ in range(num_tokens):
        assert session.receive(legacy_reply("a").infer_response)[0].finish_reason is None
    (last,) = session.finish()
    assert (last.text, last.finish_reason) == ("", reason)


def test_a_failure_before_the_first_response_is_a_connections_and_after_it_a_streams():
    session = new_session()
    session.start_attempt()
    assert isinstance(session.fail("UNAVAILABLE", "reset"), ConnectionFailed)
    session.receive(reply("a").infer_response)
    assert isinstance(session.fail("UNAVAILABLE", "reset"), StreamBroken)


def test_llm_needs_no_stop_message():
    session = new_session()
    session.start_attempt()
    session.receive(reply("a").infer_response)
    assert session.stop_request is None


@pytest.mark.parametrize("model", ["ensemble", "engine"])
def test_giving_up_a_legacy_request_needs_a_stop_message_while_it_runs(model):
    prompt: Any = "x" if model == "ensemble" else [1, 2]
    session = new_session(model=model, prompt=prompt, request_id="r9")
    assert session.stop_request is None  # not sent yet
    session.start_attempt()
    stop = ReceivedRequest.read(to_message(session.stop_request.request), None)
    assert (stop.model, stop.request_id, stop.inputs["stop"]) == ("engine", "r9", [True])
    assert len(session.stop_request.delays_s) == 2  # it may not have reached the engine yet
    session.receive(legacy_reply("a").infer_response)
    assert session.stop_request.delays_s == (0.0,)
    session.refuse("cancelled: stopped")
    assert session.stop_request is None  # the server ended it


def test_the_deadline_of_an_ensemble_is_followed_by_a_stop_message():
    session = new_session(model="ensemble", timeout_s=1.0)
    session.start_attempt()
    session.receive(legacy_reply("a").infer_response)
    assert isinstance(session.fail("DEADLINE_EXCEEDED", ""), DeadlineExceeded)
    assert session.stop_request is not None


def test_errors_of_the_server_are_not_retried_when_they_would_come_again():
    session = new_session()
    session.start_attempt()
    with pytest.raises(Cancelled):
        session.retry_delay_s(session.refuse("cancelled: stopped"))
