# SPDX-License-Identifier: Apache-2.0
"""A CoreClient that a test drives by hand: it records what is submitted and sends what the test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wavetrain_engine.errors import EngineDead
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
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
    """Requests in `requests`, cancels in `cancelled`; `send` plays the core."""

    def __init__(self, *, is_alive: bool = True) -> None:
        self.is_alive = is_alive
        self.requests: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.is_closed = False
        self.holds_s: list[float] = []
        self._sinks: dict[str, Callable[[RequestUpdate], None]] = {}

    def start(self) -> EngineFacts:
        return FACTS

    def submit(self, request: EngineRequest, sink: Callable[[RequestUpdate], None]) -> None:
        if not self.is_alive:
            raise EngineDead("the engine core is restarting; try again")
        self.requests.append(request)
        self._sinks[request.request_id] = sink

    def cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.cancelled.append(request_id)
            sink = self._sinks.pop(request_id, None)
            if sink is not None:
                sink(RequestUpdate(request_id=request_id, finish_reason=FinishReason.CANCELLED))

    def hold(self, until_s: float) -> None:
        self.holds_s.append(until_s)

    def close(self, timeout_s: float) -> None:
        self.is_closed = True

    def send(
        self, index: int, token_ids: list[int], finish_reason: FinishReason | None = None, **fields: object
    ) -> None:
        """Sends the update of the index-th submitted request."""
        request_id = self.requests[index].request_id
        sink = self._sinks[request_id] if finish_reason is None else self._sinks.pop(request_id)
        sink(RequestUpdate(request_id=request_id, new_token_ids=token_ids, finish_reason=finish_reason, **fields))  # type: ignore[arg-type]
