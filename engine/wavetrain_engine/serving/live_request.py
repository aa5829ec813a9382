# SPDX-License-Identifier: Apache-2.0
"""One Triton request while it runs: its sequences, the news that wait to be sent, and its one end.

A Triton request becomes one core request per row and returned sequence. Invariants:
    1. `push` and `cancel` may be called by any thread at any time; everything else happens on the one sender
       thread that the request is pinned to, so responses keep their order
    2. exactly one response carries the final flag, it is the last, and it is sent when every sequence has ended
       or one of them has failed; a failed one ends the whole request, as Triton knows one error per request
    3. whatever piled up since the last response leaves in the next one, so a slow sender merges tokens and
       never loses, doubles or reorders any
    4. the server is never asked about a request whose last response was sent: it has freed it by then and would
       crash (measured with server 2.51), so asking and sending the last response exclude each other
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.request import EngineRequest, FinishReason, RequestStats, RequestUpdate, TokenLogprobs
from wavetrain_engine.serving.error_codes import triton_error
from wavetrain_engine.serving.row_inputs import RowOptions
from wavetrain_engine.text.text_stream import TextDelta, TextStream


@dataclass(slots=True, kw_only=True)
class Unsent:
    """What one sequence has to say in its next response."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class LiveSequence:
    """One core request of a Triton request.

    Attributes:
        prompt_text: what precedes the output's text in the first response.
        cumulative_logprob: over all output tokens so far, those not sent included.
        finish_reason: once known, for good; in `unsent` until it was sent.
        is_finished: nothing more will come; `unsent` may still wait.
        is_closed: its last response was written.
    """

    def __init__(
        self,
        *,
        request: EngineRequest,
        options: RowOptions,
        row: int,
        sequence_index: int,
        text_stream: TextStream,
        prompt_text: str = "",
    ) -> None:
        self.request = request
        self.options = options
        self.row = row
        self.sequence_index = sequence_index
        self.prompt_text = prompt_text
        self.cumulative_logprob = 0.0
        self.stats: RequestStats | None = None
        self.finish_reason: FinishReason | None = None
        self.unsent = Unsent()
        self.is_finished = False
        self.is_closed = False
        self._text_stream = text_stream

    def take(self, update: RequestUpdate) -> bool:
        """Adds the update's news to `unsent`. Returns whether the core has to be told to end the request."""
        if update.stats is not None:
            self.stats = update.stats
        delta = self._text_stream.push(update)
        self._add(delta)
        if update.finish_reason is not None:
            self.is_finished = True
        elif delta.is_stopped and not self.options.return_perf_metrics:
            # What it cost is only known when the core has ended it, which takes a step.
            self.is_finished = True
        return delta.is_stopped

    def take_unsent(self) -> Unsent:
        """Returns what waits to be sent, and forgets it."""
        unsent, self.unsent = self.unsent, Unsent()
        self.prompt_text = ""
        self.is_closed = self.is_finished
        return unsent

    def _add(self, delta: TextDelta) -> None:
        unsent = self.unsent
        unsent.text += delta.text
        unsent.token_ids += delta.token_ids
        if delta.logprobs:
            unsent.logprobs += delta.logprobs
            self.cumulative_logprob += sum(entry.logprobs[0] for entry in delta.logprobs)
        if delta.finish_reason is not None:
            self.finish_reason = unsent.finish_reason = delta.finish_reason
            unsent.stop_reason = delta.stop_reason


class ResponseWriter(Protocol):
    """Makes a model's responses."""

    def write(self, sequences: Sequence[LiveSequence]) -> list[list[Any]]:
        """Takes what is ready to be sent from the sequences; returns each response's output tensors."""
        ...


class LiveRequest:
    """A Triton request whose responses are sent from a sender thread."""

    def __init__(
        self,
        *,
        request_id: str,
        sender: Any,
        sequences: Sequence[LiveSequence],
        writer: ResponseWriter,
        cancel_in_core: Callable[[Sequence[str]], None],
        schedule: Callable[[LiveRequest], None],
        on_end: Callable[[LiveRequest], None],
    ) -> None:
        """
        Args:
            request_id: the client's name for it, may be empty.
            sender: the Triton request's response sender.
            schedule: has `flush` called soon, on the request's sender thread.
            on_end: called once, before the last response is sent.
        """
        self.request_id = request_id
        self.sequences = sequences
        self._sender = sender
        self._writer = writer
        self._cancel_in_core = cancel_in_core
        self._schedule = schedule
        self._on_end = on_end
        self._by_id = {sequence.request.request_id: sequence for sequence in sequences}
        self._lock = threading.Lock()
        self._sender_lock = threading.Lock()
        self._updates: list[RequestUpdate] = []
        self._is_scheduled = False
        self._is_ended = False

    def push(self, update: RequestUpdate) -> None:
        """Takes news from the core; costs an append."""
        with self._lock:
            self._updates.append(update)
            if self._is_scheduled:
                return
            self._is_scheduled = True
        self._schedule(self)

    def cancel(self) -> None:
        """Ends the request early; its last response still follows, with finish reason `cancelled`."""
        self._cancel_in_core([*self._by_id])

    def is_cancelled_by_client(self) -> bool:
        """Whether the client has cancelled the call or gone away. A round trip to the server."""
        with self._sender_lock:
            return not self._is_ended and bool(self._sender.is_cancelled())

    def flush(self) -> None:
        """Sends what has piled up. Sender thread only."""
        with self._lock:
            updates, self._updates = self._updates, []
            self._is_scheduled = False
        stopped: list[str] = []
        for update in updates:
            if self._is_ended:
                return
            sequence = self._by_id[update.request_id]
            if update.error_code is not None and not sequence.is_finished:
                sequence.is_finished = True
                self.fail(update.error_code, update.error or "the request failed")
                return
            if sequence.take(update):
                stopped.append(update.request_id)
        if stopped:
            self._cancel_in_core(stopped)
        if not self._is_ended:
            self._send_ready()

    def fail(self, code: ErrorCode, message: str) -> None:
        """Ends the request with an error, and with it all its sequences. Sender thread only."""
        if self._is_ended:
            return
        unfinished = [name for name, sequence in self._by_id.items() if not sequence.is_finished]
        if unfinished:
            self._cancel_in_core(unfinished)
        self._end(pb_utils.InferenceResponse(error=triton_error(code, message)))

    def _send_ready(self) -> None:
        responses = self._writer.write(self.sequences)
        is_last = all(sequence.is_closed for sequence in self.sequences)
        for tensors in responses[:-1] if is_last else responses:
            self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))
        if is_last:
            self._end(pb_utils.InferenceResponse(output_tensors=responses[-1]))

    def _end(self, response: Any) -> None:
        self._on_end(self)
        with self._sender_lock:
            self._is_ended = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
