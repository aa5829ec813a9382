# SPDX-License-Identifier: Apache-2.0
"""One Triton request while it runs: its sequences, the news that wait to be sent, and its one end.

A Triton request becomes one core request per row and returned sequence. Invariants:
    1. `cancel` and `is_cancelled_by_client` may be called by any thread at any time; everything else happens on the
       one thread that hears from the core, so responses keep their order
    2. exactly one response carries the final flag, it is the last, and it is sent when every sequence has ended
       or one of them has failed; a failed one ends the whole request, as Triton knows one error per request
    3. whatever piled up since the last response leaves in the next one, so a sender that may not or cannot send more
       often merges tokens and never loses, doubles or reorders any; the first token and an end wait for nothing
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
from wavetrain_engine.request import (
    EngineRequest,
    FinishReason,
    RequestStats,
    RequestUpdate,
    TokenLogprobs,
    merge_updates,
)
from wavetrain_engine.serving.error_codes import triton_error
from wavetrain_engine.serving.outbox import Haste
from wavetrain_engine.serving.row_inputs import RowOptions
from wavetrain_engine.text.text_stream import TextDelta, TextStream
from wavetrain_engine.text.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class Unsent:
    """What one sequence has to say in its next response."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] | None = None
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
        if update.prompt_logprobs is not None:
            self.unsent.prompt_logprobs = update.prompt_logprobs
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


def live_sequences(
    core_requests: Sequence[EngineRequest],
    *,
    row: int,
    options: RowOptions,
    tokenizer: Tokenizer | None,
    prompt_text: str = "",
) -> list[LiveSequence]:
    """Makes what follows the core requests of one row; without a tokenizer there is no text."""
    return [
        LiveSequence(
            request=request,
            options=options,
            row=row,
            sequence_index=index,
            text_stream=TextStream(tokenizer, request.sampling_params, request.prompt_token_ids),
            prompt_text=prompt_text,
        )
        for index, request in enumerate(core_requests)
    ]


class ResponseWriter(Protocol):
    """Makes a model's responses."""

    def write(self, sequences: Sequence[LiveSequence]) -> list[list[Any]]:
        """Takes what is ready to be sent from the sequences; returns each response's output tensors."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a Triton request is answered from, and by what."""

    sequences: Sequence[LiveSequence]
    writer: ResponseWriter


class LiveRequest:
    """A Triton request whose responses are sent when there is news of it."""

    def __init__(
        self,
        *,
        request_id: str,
        sender: Any,
        answer: Answer,
        cancel_in_core: Callable[[Sequence[str]], None],
        schedule: Callable[[LiveRequest, Haste], None],
        on_end: Callable[[LiveRequest], None],
        stream_interval: int | None = None,
    ) -> None:
        """
        Args:
            request_id: the client's name for it, may be empty.
            sender: the Triton request's response sender.
            schedule: has `flush`, or for Haste.LOOK `look`, called soon.
            on_end: called once, before the last response is sent.
            stream_interval: tokens per streamed response at least; None: as many as the pace of sending makes them.
        """
        self.request_id = request_id
        self.sequences = sequences = answer.sequences
        self._sender = sender
        self._writer = answer.writer
        self._cancel_in_core = cancel_in_core
        self._schedule = schedule
        self._on_end = on_end
        self._stream_interval = None if stream_interval is None else stream_interval * len(sequences)
        self._is_streaming = any(sequence.options.stream for sequence in sequences)
        # Only this process can see the end that a stop string makes, and until it does the core goes on computing.
        self._has_stop_strings = any(sequence.request.sampling_params.stop for sequence in sequences)
        self._by_id = {sequence.request.request_id: sequence for sequence in sequences}
        self._sender_lock = threading.Lock()
        self._updates: list[RequestUpdate] = []
        self._num_unsent_tokens = 0
        self._has_sent = False
        self._failure: RequestUpdate | None = None
        self._is_ended = False

    def push(self, update: RequestUpdate) -> None:
        """Takes news from the core; costs an append."""
        self._updates.append(update)
        self._num_unsent_tokens += len(update.new_token_ids)
        haste = Haste.NOW if update.finish_reason is not None else self._haste()
        if haste is not None:
            self._schedule(self, haste)

    def cancel(self) -> None:
        """Ends the request early; its last response still follows, with finish reason `cancelled`."""
        self._cancel_in_core([*self._by_id])

    def is_cancelled_by_client(self) -> bool:
        """Whether the client has cancelled the call or gone away. A round trip to the server."""
        with self._sender_lock:
            return not self._is_ended and bool(self._sender.is_cancelled())

    def look(self) -> int:
        """Finds out whether the news end a sequence, and if not, whether they may wait.

        Returns:
            The number of responses sent.
        """
        if self._digest(is_sent=False) or self._failure is not None:
            return self.flush()
        haste = self._haste_to_send()
        if haste is Haste.NOW:
            return self.flush()
        if haste is not None:
            self._schedule(self, haste)
        return 0

    def flush(self) -> int:
        """Sends what has piled up. Returns the number of responses sent."""
        self._digest(is_sent=True)
        if self._is_ended:
            return 0
        num_sent = self._send_ready()
        failure = self._failure
        if failure is not None and failure.error_code is not None:
            self._by_id[failure.request_id].is_finished = True
            self.fail(failure.error_code, failure.error or "the request failed")
            num_sent += 1
        self._has_sent = self._has_sent or num_sent > 0
        return num_sent

    def fail(self, code: ErrorCode, message: str) -> None:
        """Ends the request with an error, and with it all its sequences."""
        if self._is_ended:
            return
        unfinished = [name for name, sequence in self._by_id.items() if not sequence.is_finished]
        if unfinished:
            self._cancel_in_core(unfinished)
        self._end(pb_utils.InferenceResponse(error=triton_error(code, message)))

    def _haste(self) -> Haste | None:
        """How soon news that are no end have to be dealt with; None: with the end is soon enough."""
        return Haste.LOOK if self._has_stop_strings else self._haste_to_send()

    def _haste_to_send(self) -> Haste | None:
        if not self._is_streaming:
            return None
        if not self._has_sent:
            return Haste.NOW
        if self._stream_interval is None:
            return Haste.LATER
        return Haste.NOW if self._num_unsent_tokens >= self._stream_interval else None

    def _digest(self, *, is_sent: bool) -> bool:
        """Gives the sequences their news. Returns whether a stop string has just ended one of them.

        `is_sent`: what they have to say is sent next.
        """
        updates, self._updates = self._updates, []
        if is_sent:
            self._num_unsent_tokens = 0
        if self._is_ended:
            return False
        news: dict[str, list[RequestUpdate]] = {}
        for update in updates:
            if update.error_code is not None and not self._by_id[update.request_id].is_finished:
                self._failure = update
                break
            news.setdefault(update.request_id, []).append(update)
        # Together, as text is made of several tokens in one go.
        stopped = [name for name, parts in news.items() if self._by_id[name].take(merge_updates(parts))]
        if stopped:
            self._cancel_in_core(stopped)
        return bool(stopped)

    def _send_ready(self) -> int:
        responses = self._writer.write(self.sequences)
        is_last = all(sequence.is_closed for sequence in self.sequences)
        for tensors in responses[:-1] if is_last else responses:
            self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))
        if is_last:
            self._end(pb_utils.InferenceResponse(output_tensors=responses[-1]))
        return len(responses)

    def _end(self, response: Any) -> None:
        self._on_end(self)
        with self._sender_lock:
            self._is_ended = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
