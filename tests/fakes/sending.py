# SPDX-License-Identifier: Apache-2.0
"""Sending without a core: streams, and a clock that only sending moves on."""

from __future__ import annotations

from typing import Any

import numpy as np

from fakes import pb_utils
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.serving.engine_writer import EngineWriter
from wavetrain_engine.serving.live_request import Answer, LiveRequest, LiveSequence
from wavetrain_engine.serving.outbox import Haste, Outbox
from wavetrain_engine.serving.row_inputs import RowOptions
from wavetrain_engine.serving.send_pace import SendPace
from wavetrain_engine.text.text_stream import TextStream


class TimedSender(pb_utils.ResponseSender):
    """Remembers when each response was sent, and costs time."""

    def __init__(self, bench: SendingBench) -> None:
        super().__init__()
        self.sent_at_s: list[float] = []
        self._bench = bench

    def send(self, response: Any = None, flags: int = 0) -> None:
        self._bench.now_s += self._bench.cost_s
        self.sent_at_s.append(self._bench.now_s)
        super().send(response, flags)

    @property
    def chunks(self) -> list[list[int]]:
        """The token ids of each response."""
        ids = [np.asarray(response.values()["output_ids"]).reshape(-1).tolist() for response in self.responses]
        lengths = [int(response.values()["sequence_length"].sum()) for response in self.responses]
        assert [len(chunk) for chunk in ids] == lengths
        return ids


class SendingBench:
    """Streams of token ids through LiveRequest and Outbox; a response costs `cost_s` of processor time."""

    def __init__(self, *, budget_cores: float, cost_s: float, stream_interval: int | None = None) -> None:
        self.now_s = 0.0
        self.cost_s = cost_s
        self.cancelled: list[str] = []
        self._pace = SendPace(budget_cores)
        self._outbox: Outbox[LiveRequest] = Outbox(self._pace, lambda: self.now_s)
        self._stream_interval = stream_interval

    def open(self, name: str, *, stream: bool = True) -> tuple[LiveRequest, TimedSender]:
        """A request of one sequence, called `name` in the core too."""
        params = SamplingParams(max_tokens=1000)
        request = EngineRequest(request_id=name, prompt_token_ids=[1], sampling_params=params)
        sequence = LiveSequence(
            request=request,
            options=RowOptions(stream=stream, exclude_input=True),
            row=0,
            sequence_index=0,
            text_stream=TextStream(None, params),
        )
        sender = TimedSender(self)
        live = LiveRequest(
            request_id=name,
            sender=sender,
            answer=Answer([sequence], EngineWriter([sequence], [0], None)),
            cancel_in_core=self.cancelled.extend,
            schedule=self._schedule,
            on_end=lambda live: None,
            stream_interval=self._stream_interval,
        )
        return live, sender

    def run_sender(self) -> None:
        """Does what is due, as a Sender does."""
        while self._outbox.wait_s() == 0.0:
            look, due = self._outbox.take()
            for live in look:
                live.look()
            started_s = self.now_s
            num_responses = sum(live.flush() for live in due)
            self._pace.charge(self.now_s, num_responses, self.now_s - started_s)

    def wait(self, until_s: float) -> None:
        """Lets time pass, and sends when the time for it has come."""
        while (wait_s := self._outbox.wait_s()) is not None and self.now_s + wait_s <= until_s:
            self.now_s += wait_s
            self.run_sender()
        self.now_s = max(self.now_s, until_s)

    def _schedule(self, live: LiveRequest, haste: Haste) -> None:
        self._outbox.put(live, haste)


def token_update(name: str, token_ids: list[int], *, is_last: bool = False) -> RequestUpdate:
    """A step's news of one request."""
    reason = FinishReason.LENGTH if is_last else None
    return RequestUpdate(request_id=name, new_token_ids=token_ids, finish_reason=reason)
