# SPDX-License-Identifier: Apache-2.0
"""A CoreClient that a test drives by hand: it records what is submitted and sends what the test says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from queue import Empty, Queue
from threading import Thread

from wavetrain_engine.errors import EngineDead
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.ipc.core_client import Sink
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate

FACTS = EngineFacts(
    architecture="Fake",
    dtype="float32",
    device="none",
    cpu_threads=1,
    kernels="none",
    vocab_size=512,
    max_model_len=256,
    block_size=16,
    num_blocks=64,
    kv_cache_dtype="float32",
    kv_cache_bytes=0,
    weight_bytes=0,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    generation=GenerationConfig(temperature=0.6, top_p=0.9),
    load_s=0.0,
    version="0",
)


class FakeCoreClient:
    """Requests in `requests`, cancels in `cancelled`; `send` plays the core. News are heard on a thread of its own."""

    def __init__(self, *, is_alive: bool = True) -> None:
        self.is_alive = is_alive
        self.requests: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.is_closed = False
        self.holds_s: list[float] = []
        self._sinks: dict[str, Sink] = {}
        self._news: Queue[tuple[Sink, RequestUpdate] | None] = Queue()
        self._thread: Thread | None = None

    def start(self, after_news: Callable[[], float | None] = lambda: None) -> EngineFacts:
        self._thread = Thread(target=self._run, args=(after_news,), daemon=True)
        self._thread.start()
        return FACTS

    def submit(self, requests: Sequence[EngineRequest], make_sink: Callable[[], Sink]) -> None:
        if not self.is_alive:
            raise EngineDead("the engine core is restarting; try again")
        self._sinks.update(dict.fromkeys((request.request_id for request in requests), make_sink()))
        self.requests += requests

    def cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.cancelled.append(request_id)
            sink = self._sinks.pop(request_id, None)
            if sink is not None:
                self._news.put((sink, RequestUpdate(request_id=request_id, finish_reason=FinishReason.CANCELLED)))

    def hold(self, until_s: float) -> None:
        self.holds_s.append(until_s)

    def close(self, timeout_s: float) -> None:
        self.is_closed = True
        self._news.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def send(
        self, index: int, token_ids: list[int], finish_reason: FinishReason | None = None, **fields: object
    ) -> None:
        """Sends the update of the index-th submitted request."""
        request_id = self.requests[index].request_id
        sink = self._sinks[request_id] if finish_reason is None else self._sinks.pop(request_id)
        update = RequestUpdate(
            request_id=request_id,
            new_token_ids=token_ids,
            finish_reason=finish_reason,
            **fields,  # type: ignore[arg-type]
        )
        self._news.put((sink, update))

    def _run(self, after_news: Callable[[], float | None]) -> None:
        wait_s: float | None = None
        while self._hear(wait_s):
            wait_s = after_news()

    def _hear(self, wait_s: float | None) -> bool:
        """Hands on all that is there, as from a socket. Returns whether there may be more."""
        with contextlib.suppress(Empty):
            news = self._news.get(timeout=wait_s)
            while news is not None:
                sink, update = news
                sink(update)
                news = self._news.get_nowait()
            return False
        return True
