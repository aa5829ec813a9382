# SPDX-License-Identifier: Apache-2.0
"""An EngineCore on a FakeExecutor, small enough to see through, with a clock that only tests move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fakes.executor import FakeExecutor
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core.engine_core import EngineCore
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams

VOCAB_SIZE = 97


class FakeClock:
    """Seconds for deadlines, nanoseconds for stats; both stand still until told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return int(self.now_s * 1e9)


def make_facts(config: EngineConfig, *, max_model_len: int, vocab_size: int, eos: list[int]) -> EngineFacts:
    """Facts that agree with a config."""
    return EngineFacts(
        architecture="FakeForCausalLM",
        dtype="float32",
        device="cpu",
        cpu_threads=1,
        kernels="fake",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks or 0,
        kv_cache_dtype="float32",
        kv_cache_bytes=0,
        weight_bytes=0,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        generation=GenerationConfig(eos_token_ids=eos),
        load_s=0.0,
        version="0",
    )


class CoreHarness:
    """A core, its executor and its clock; collects what the core says about each request.

    Args:
        flags: engine options by name; what is not given is small.
    """

    def __init__(
        self,
        *,
        max_model_len: int | None = None,
        eos: tuple[int, ...] = (),
        nan_token_id: int | None = None,
        fails_at_step: int | None = None,
        vocab_size: int = VOCAB_SIZE,
        on_end: Callable[[str, RequestUpdate], None] | None = None,
        **flags: Any,
    ) -> None:
        small = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        self.config = EngineConfig.from_flags(small | flags)
        cache, scheduler = self.config.cache, self.config.scheduler
        capacity = (cache.num_blocks or 0) * cache.block_size
        self.max_model_len = capacity if max_model_len is None else max_model_len
        self.facts = make_facts(self.config, max_model_len=self.max_model_len, vocab_size=vocab_size, eos=list(eos))
        self.clock = FakeClock()
        self.executor = FakeExecutor(
            num_blocks=cache.num_blocks or 0,
            block_size=cache.block_size,
            vocab_size=vocab_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            eos=eos,
            nan_token_id=nan_token_id,
            fails_at_step=fails_at_step,
        )
        self.core = EngineCore(
            self.config,
            self.facts,
            self.executor,
            on_end=on_end,
            monotonic_s=self.clock.monotonic_s,
            time_ns=self.clock.time_ns,
        )
        self.updates: dict[str, list[RequestUpdate]] = {}

    def add(self, request_id: str, prompt: list[int], *, priority: int = 0, **params: Any) -> None:
        """Adds a request; `deadline_s`, `cache_salt` and the like among the keywords belong to the request."""
        names = ("deadline_s", "cache_salt", "arrival_time_ns", "traceparent")
        own = {name: params.pop(name) for name in names if name in params}
        self.core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(**{"temperature": 0.0, **params}),
                priority=priority,
                **own,
            )
        )

    def step(self) -> list[RequestUpdate]:
        """One step; its updates are remembered, and checked to be no news of the dead."""
        updates = self.core.step()
        for update in updates:
            told = self.updates.setdefault(update.request_id, [])
            assert not told or told[-1].finish_reason is None, f"{update.request_id} ended twice"
            told.append(update)
        return updates

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until there is nothing to do, and checks that nothing is left behind."""
        for _ in range(max_steps):
            if not self.core.has_work:
                self.core.check()
                assert self.core.stats().num_blocks_used == 0
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        """All output tokens of a request so far."""
        return [token_id for update in self.updates.get(request_id, []) for token_id in update.new_token_ids]

    def last(self, request_id: str) -> RequestUpdate:
        """The last update of a request."""
        return self.updates[request_id][-1]

    def reason(self, request_id: str) -> FinishReason | None:
        """Its finish reason; None while it is unfinished."""
        told = self.updates.get(request_id)
        return told[-1].finish_reason if told else None
