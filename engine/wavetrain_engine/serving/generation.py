# SPDX-License-Identifier: Apache-2.0
"""Requests in, responses out: what `engine` and `llm` share once the tensors are read."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import EngineDead, RequestError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.fan_out import child_requests, resolve_params
from wavetrain_engine.ipc.core_client import CoreClient, Sink
from wavetrain_engine.request import EngineRequest
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.serving.cancellation import LiveRequests
from wavetrain_engine.serving.live_request import Answer, LiveRequest
from wavetrain_engine.serving.request_parameters import RequestParameters
from wavetrain_engine.serving.sender import Sender
from wavetrain_engine.stats import EngineStats
from wavetrain_engine.text.tokenizer import Tokenizer

_FINALIZE_TIMEOUT_S = 8.0
# Of the cores, for sending. On the CPU the engine needs them all itself; beside a device they have little else to do.
_CPU_SENDING_SHARE = 0.05
_DEVICE_SENDING_SHARE = 0.5


class Generation:
    """Runs the Triton requests of one model on the engine core."""

    def __init__(self, client: CoreClient, *, stream_interval: int | None = None) -> None:
        """`stream_interval`: tokens per streamed response at least; None: as many as the pace of sending makes them."""
        self._client = client
        self._stream_interval = stream_interval
        self._sender: Sender | None = None
        self._live: LiveRequests | None = None
        self._prefix = f"{os.getpid():x}"
        self._count = itertools.count()

    def start(self) -> EngineFacts:
        """Attaches to the core. Raises what CoreClient.start raises."""
        facts = self._client.start(self._send_due)
        share = _CPU_SENDING_SHARE if facts.device == "cpu" else _DEVICE_SENDING_SHARE
        self._sender = Sender(
            budget_cores=share * len(os.sched_getaffinity(0)),
            on_pause=self._client.hold if self._stream_interval is None else None,
        )
        self._live = LiveRequests()
        return facts

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken now."""
        return self._client.is_alive

    def read_stats(self) -> EngineStats:
        """Asks the core for its counters. Raises what CoreClient.read_stats raises."""
        return self._client.read_stats()

    def core_requests(
        self,
        *,
        prompt_token_ids: list[int],
        params: SamplingParams,
        parameters: RequestParameters,
        tokenizer: Tokenizer | None,
    ) -> list[EngineRequest]:
        """Makes what the core has to run for one row, `params.n` requests.

        Raises:
            InvalidSamplingParams: stop strings or bad words where there is no text.
        """
        request = EngineRequest(
            request_id=f"{self._prefix}-{next(self._count)}",
            prompt_token_ids=prompt_token_ids,
            sampling_params=resolve_params(params, tokenizer),
            priority=parameters.priority,
            deadline_s=parameters.deadline_s,
            cache_salt=parameters.cache_salt,
            arrival_time_ns=time.time_ns(),
            traceparent=parameters.traceparent,
        )
        return child_requests(request)

    def run(self, request: Any, core_requests: Sequence[EngineRequest], make_answer: Callable[[], Answer]) -> None:
        """Hands what a Triton request comes to over to the core, and makes what answers it; responses follow.

        Raises:
            EngineDead: there is no core right now, or the model has not been started.
        """
        if self._sender is None or self._live is None:
            raise EngineDead("the model has not been started")
        schedule, live_requests = self._sender.schedule, self._live

        def make_sink() -> Sink:
            live = LiveRequest(
                request_id=request.request_id(),
                sender=request.get_response_sender(),
                answer=make_answer(),
                cancel_in_core=self._client.cancel,
                schedule=schedule,
                on_end=live_requests.remove,
                stream_interval=self._stream_interval,
            )
            live_requests.add(live)
            return live.push

        self._client.submit(core_requests, make_sink)
        live_requests.watch()

    def stop(self, request: Any) -> None:
        """Carries out `stop=true`: ends the requests of this id, and answers with an empty last response.

        Raises:
            RequestError: there is no id.
        """
        request_id = request.request_id()
        if not request_id:
            raise RequestError("stop needs the id of the request to end; send it as this request's id")
        if self._live is not None:
            self._live.stop(request_id)
        request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def close(self) -> None:
        """Ends everything, within a few seconds. Idempotent."""
        if self._live is not None:
            self._live.close(timeout_s=1.0)
        self._client.close(_FINALIZE_TIMEOUT_S)

    def _send_due(self) -> float | None:
        return None if self._sender is None else self._sender.send_due()
