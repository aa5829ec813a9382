# SPDX-License-Identifier: Apache-2.0
"""The life of one request, without I/O: messages of the server in, chunks or errors out.

The sync and the async client are two shells around `StreamSession`: they open calls, wait and cancel; what a message
means, whether a failure may be repeated and how much time is left is decided here, once.

Invariants:
    1. a request whose first response has arrived is never sent again
    2. every sequence ends with exactly one chunk that has a finish_reason, or the request ends with an error
    3. whatever ends the request early, `stop_request` says what the server still has to be told
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wavetrain_client.chunk import Chunk, FinishReason
from wavetrain_client.errors import (
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    StreamBroken,
    error_from_message,
    error_from_status,
)
from wavetrain_client.options import GenerationRequest
from wavetrain_client.retry import RetryPolicy
from wavetrain_client.wire import (
    DEFAULT_MAX_TOKENS,
    ENGINE_MODEL,
    ENSEMBLE_MODEL,
    WireRequest,
    decode_response,
    encode_request,
    encode_stop,
)

STOP_REPEAT_DELAY_S = 0.5

# Their contracts have no finish reason: it follows from the number of tokens when the stream ends well.
_MODELS_WITHOUT_REASON = {ENSEMBLE_MODEL, ENGINE_MODEL}


@dataclass(frozen=True, slots=True)
class StopRequest:
    """What the server has to be told when a request is given up, and when: the delay before each sending."""

    request: WireRequest
    delays_s: tuple[float, ...]


class StreamSession:
    """Drives one request from its first attempt to its end.

    A shell calls `start_attempt`, opens a call with what it returns, and reports what happens: `receive` for each
    response, `refuse` for an error message in its place, `finish` when the server ended the call well, `fail` when the
    call failed. With an error that any of them raises or returns it asks `retry_delay_s`, which returns the time to
    wait or raises the error again.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        url: str,
        retry_policy: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self._url = url
        self._retry_policy = retry_policy
        self._clock = clock
        self._deadline_s = None if request.timeout_s is None else clock() + request.timeout_s
        self._num_failed = 0
        self._has_response = False
        self._is_running_on_server = False
        self._num_output_tokens: dict[int, int] = {}
        self._finished: set[int] = set()

    def start_attempt(self) -> tuple[WireRequest, float | None]:
        """Returns what to send and the time the call may take (None: no limit).

        Raises:
            DeadlineExceeded: no time is left.
            RequestRejected: the request cannot be encoded.
        """
        time_left_s = self._time_left_s()
        encoded = encode_request(self.request, timeout_s=time_left_s)
        self._is_running_on_server = True
        return encoded, time_left_s

    def receive(self, response: Any) -> list[Chunk]:
        """Takes one ModelInferResponse; returns its chunks.

        Raises:
            ServerFailed: it makes no sense.
        """
        decoded = decode_response(response)
        self._has_response = self._has_response or bool(decoded)
        # llm's responses tell of all sequences, of finished ones with nothing.
        chunks = [chunk for chunk in decoded if chunk.sequence_index not in self._finished or chunk.text]
        for chunk in chunks:
            index = chunk.sequence_index
            self._num_output_tokens[index] = self._num_output_tokens.get(index, 0) + (chunk.num_output_tokens or 0)
            if chunk.finish_reason is not None:
                self._finished.add(index)
        return chunks

    def refuse(self, message: str) -> ClientError:
        """Takes an error message of the server, which ends the attempt; returns the error it stands for."""
        self._is_running_on_server = False
        return error_from_message(message)

    def finish(self) -> list[Chunk]:
        """Takes the server's good end of the call; returns the last chunks of sequences that still lack theirs.

        Raises:
            StreamBroken: the server ended the call before the request was finished.
        """
        self._is_running_on_server = False
        unfinished = [index for index in self._num_output_tokens if index not in self._finished]
        if not self._num_output_tokens or (unfinished and self.request.model not in _MODELS_WITHOUT_REASON):
            raise StreamBroken("the server ended the stream before the request was finished")
        self._finished.update(unfinished)
        return [self._last_chunk(index) for index in unfinished]

    def fail(self, code: str, details: str) -> ClientError:
        """Takes the failure of the call; returns the error it stands for."""
        error = error_from_status(code, details, url=self._url, has_started=self._has_response)
        if isinstance(error, ConnectionFailed):
            self._is_running_on_server = False
        return error

    def retry_delay_s(self, error: ClientError) -> float:
        """Returns how long to wait before the next attempt.

        Raises:
            ClientError: `error` itself, when the request must not or cannot be sent again.
        """
        self._num_failed += 1
        delay_s = None if self._has_response else self._retry_policy.delay_s(error, self._num_failed)
        if delay_s is None:
            raise error
        if self._deadline_s is not None and self._clock() + delay_s >= self._deadline_s:
            raise error
        return delay_s

    @property
    def stop_request(self) -> StopRequest | None:
        """What to send when the request is given up now; None when ending the call is enough.

        An ensemble does not pass the end of its call on to its steps, so the engine has to be told by request id.
        Before the first response the request may still be on its way to the engine, which then does not know the
        id yet: so the engine is told twice.
        """
        if not self._is_running_on_server or self.request.model not in _MODELS_WITHOUT_REASON:
            return None
        delays_s = (0.0,) if self._has_response else (0.0, STOP_REPEAT_DELAY_S)
        return StopRequest(encode_stop(self.request.id), delays_s)

    def _time_left_s(self) -> float | None:
        if self._deadline_s is None:
            return None
        time_left_s = self._deadline_s - self._clock()
        if time_left_s <= 0:
            raise DeadlineExceeded("the request was not finished within its timeout_s; give it more time")
        return time_left_s

    def _last_chunk(self, index: int) -> Chunk:
        max_tokens: int = self.request.given.get("max_tokens", DEFAULT_MAX_TOKENS)
        reason: FinishReason = "length" if self._num_output_tokens[index] >= max_tokens else "stop"
        return Chunk(sequence_index=index, finish_reason=reason)
