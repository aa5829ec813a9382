# SPDX-License-Identifier: Apache-2.0
"""The engine with random weights, as a benchmark drives it: requests in, the moment of every token out."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from wavetrain_engine.config import EngineConfig
from wavetrain_engine.environment import Environment
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.local_engine import LocalEngine
from wavetrain_engine.plan import Executor
from wavetrain_engine.request import EngineRequest, FinishReason, RequestUpdate
from wavetrain_engine.sampling_params import SamplingParams
from wavetrain_engine.worker_import import import_worker

_TIMEOUT_S = 500


@dataclass
class Timeline:
    """When a request's tokens came, in seconds of `time.perf_counter`."""

    request_id: str
    submitted_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list[float])
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens."""
        return [after - before for before, after in itertools.pairwise(self.token_times_s)]

    def gaps_since(self, moment_s: float) -> list[float]:
        """Between tokens that came after a moment of `time.perf_counter`."""
        times = [token_s for token_s in self.token_times_s if token_s >= moment_s]
        return [after - before for before, after in itertools.pairwise(times)]

    @property
    def first_token_s(self) -> float:
        """From submission to the first token."""
        return self.token_times_s[0] - self.submitted_s


class Engine:
    """An engine in this process. Close it, or use it as a context manager.

    Attributes:
        facts: what was found out at load; executor: what runs its steps.
        load_s: the whole load; weights_s: of it, from the first weight to the last.
    """

    facts: EngineFacts
    executor: Executor

    def __init__(self, model_dir: Path, **flags: Any) -> None:
        config = EngineConfig.from_flags(
            {"model": str(model_dir), "skip_tokenizer_init": True, "enable_prefix_caching": False, **flags}
        )
        self._weight_times: list[float] = []
        self._ids = itertools.count()
        started = time.perf_counter()
        self._engine = LocalEngine(config, lambda: self._load(config))
        self.facts = self._engine.facts
        self.load_s = time.perf_counter() - started

    def _load(self, config: EngineConfig) -> tuple[Executor, EngineFacts]:
        load = import_worker()
        self._weight_times.append(time.perf_counter())
        self.executor, facts = load(config, environment=Environment.read(), progress=self._note_progress)
        return self.executor, facts

    def _note_progress(self, phase: str, _done: int, _total: int) -> None:
        if phase == "weights":
            self._weight_times.append(time.perf_counter())

    @property
    def weights_s(self) -> float:
        """Time that the weights took, choosing kernels before them included."""
        return self._weight_times[-1] - self._weight_times[0]

    @property
    def graphs(self) -> Any:
        """The captured decode steps: `sizes()`, `replay(num_rows)`; None on a CPU, or where none were captured."""
        return getattr(getattr(self.executor, "runner", None), "graphs", None)

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Timeline]:
        """Runs requests to their ends.

        Raises:
            RuntimeError: a request failed, or they took too long.
        """
        batch = self.start(prompts, max_tokens)
        batch.wait()
        return batch.timelines

    def start(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Batch:
        """Submits requests, greedy, that end at `max_tokens` only."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        batch = Batch(self._engine, len(prompts))
        for prompt in prompts:
            request_id = f"bench-{next(self._ids)}"
            batch.submit(EngineRequest(request_id=request_id, prompt_token_ids=list(prompt), sampling_params=params))
        return batch

    def prompts(self, num_prompts: int, length: int, seed: int = 0) -> list[list[int]]:
        """Returns random prompts."""
        draw = random.Random(seed)
        return [[draw.randrange(3, self.facts.vocab_size) for _ in range(length)] for _ in range(num_prompts)]

    def close(self) -> None:
        """Ends it and frees the device."""
        self._engine.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batch:
    """Requests that run together."""

    def __init__(self, engine: LocalEngine, num_requests: int) -> None:
        self._engine = engine
        self._num_left = num_requests
        self._changed = threading.Condition()
        self.timelines: list[Timeline] = []

    def submit(self, request: EngineRequest) -> None:
        """Hands one request to the engine."""
        timeline = Timeline(request.request_id, time.perf_counter())
        self.timelines.append(timeline)
        self._engine.submit(request, lambda update: self._take(timeline, update))

    def _take(self, timeline: Timeline, update: RequestUpdate) -> None:
        now = time.perf_counter()
        timeline.token_times_s += [now] * len(update.new_token_ids)
        timeline.token_ids += update.new_token_ids
        if update.finish_reason is None:
            return
        timeline.finish_reason, timeline.error = update.finish_reason, update.error
        with self._changed:
            self._num_left -= 1
            self._changed.notify_all()

    def wait_for_tokens(self, num_tokens: int) -> None:
        """Waits until every request has so many tokens.

        Raises:
            RuntimeError: one ended before, or it took too long.
        """
        deadline = time.monotonic() + _TIMEOUT_S
        while any(len(timeline.token_ids) < num_tokens for timeline in self.timelines):
            ended = [one for one in self.timelines if one.finish_reason and len(one.token_ids) < num_tokens]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"no {num_tokens} tokens: {ended[0].error if ended else 'it took too long'}")
            time.sleep(0.005)

    def wait(self) -> None:
        """Waits for the ends of all.

        Raises:
            RuntimeError: a request failed, or they took too long.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_left == 0, _TIMEOUT_S):
                raise RuntimeError(f"{self._num_left} requests have not ended after {_TIMEOUT_S} s")
        failed = [one for one in self.timelines if one.finish_reason is FinishReason.ERROR]
        if failed:
            raise RuntimeError(f"{failed[0].request_id} failed: {failed[0].error}")

    def cancel(self) -> None:
        """Ends all at once, in one step, and waits for that."""
        self._engine.cancel([timeline.request_id for timeline in self.timelines])
        self.wait()
