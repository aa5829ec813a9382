# SPDX-License-Identifier: Apache-2.0
"""What is measured of the engine: a step against the memory's speed, idle time, its own graphs, throughput, start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu.engine import Batch, Engine
from gpu.limits import Limits
from gpu.rounds import Line, Spread, busy_time, significant, turns
from gpu.shapes import kv_bytes_per_token, weight_bytes_read


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of all parts.

    Attributes:
        contexts: prompt lengths for the step at batch 1, with `decode_tokens` outputs each, `rounds` times.
        idle_requests, idle_prompt_len, idle_s: steady decoding while the device is watched.
        replay_batches: batch sizes at which the engine is set against its own graphs.
        requests, prompt_len, output_len: the throughput.
    """

    contexts: tuple[int, ...]
    decode_tokens: int
    rounds: int
    idle_requests: int
    idle_prompt_len: int
    idle_s: float
    replay_batches: tuple[int, ...]
    requests: int
    prompt_len: int
    output_len: int

    @property
    def max_model_len(self) -> int:
        """The longest request of all."""
        return max(max(self.contexts) + self.decode_tokens, self.prompt_len + self.output_len) + 64


FULL = Plan(
    contexts=(256, 2048, 8192, 32768, 65536),
    decode_tokens=128,
    rounds=5,
    idle_requests=32,
    idle_prompt_len=512,
    idle_s=1.0,
    replay_batches=(32, 256),
    requests=256,
    prompt_len=1000,
    output_len=1000,
)
DRY = Plan(
    contexts=(8, 64),
    decode_tokens=12,
    rounds=2,
    idle_requests=3,
    idle_prompt_len=8,
    idle_s=0.05,
    replay_batches=(3,),
    requests=4,
    prompt_len=10,
    output_len=6,
)


def measure_steps(engine: Engine, plan: Plan, shape: str, limits: Limits) -> dict[str, Any]:
    """Fits the time between tokens at batch 1 to a + b * context, and sets both against the bytes they stand for."""
    engine.run(engine.prompts(1, plan.contexts[0]), plan.decode_tokens)  # warm
    gaps: dict[int, list[float]] = {context: [] for context in plan.contexts}
    for index, order in enumerate(turns([str(context) for context in plan.contexts], plan.rounds)):
        for context in map(int, order):
            (timeline,) = engine.run(engine.prompts(1, context, seed=index), plan.decode_tokens)
            gaps[context].append(statistics.median(timeline.gaps_s[plan.decode_tokens // 4 :]))
    points = [(context + plan.decode_tokens * 0.625, statistics.median(found)) for context, found in gaps.items()]
    line = Line.fit(points)
    weights_s = weight_bytes_read(shape, engine.facts.weight_bytes) / limits.copy.median
    token_s = kv_bytes_per_token(shape) / limits.copy.median
    shortest = Spread.of(gaps[plan.contexts[0]])
    return {
        "gap_ms_by_context": {context: _millis(found).as_json() for context, found in gaps.items()},
        "intercept_ms": significant(line.intercept * 1e3),
        "slope_ms_per_1k_tokens": significant(line.slope * 1e6),
        "worst_misfit": significant(line.worst),
        "weights_floor_ms": significant(weights_s * 1e3),
        "slope_floor_ms_per_1k_tokens": significant(token_s * 1e6),
        "step_over_floor": significant((shortest.median - points[0][0] * token_s) / weights_s),
        "intercept_over_floor": significant(line.intercept / weights_s),
        "slope_over_floor": significant(line.slope / token_s),
    }


def measure_idle(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Watches the device while requests decode: the share of the time in which no kernel runs."""
    num_tokens = _many(engine, plan)
    with _profiler():  # the first start of the tracer takes seconds
        pass
    batch = engine.start(engine.prompts(plan.idle_requests, plan.idle_prompt_len), num_tokens)
    batch.wait_for_tokens(4)
    steady_s = time.perf_counter()
    with _profiler() as profiler:
        time.sleep(plan.idle_s)
    batch.cancel()
    intervals = _device_intervals(profiler)
    if len(intervals) < 2:
        return {"idle_share": None, "num_device_events": len(intervals)}
    first, last = min(start for start, _ in intervals), max(end for _, end in intervals)
    return {
        "idle_share": significant(1 - busy_time(intervals) / (last - first)),
        "num_device_events": len(intervals),
        "gap_ms_while_watched": significant(_steady_gap_s(batch, steady_s) * 1e3),
    }


def _profiler() -> torch.profiler.profile:
    kind = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    return torch.profiler.profile(activities=[kind])


def _device_intervals(profiler: torch.profiler.profile) -> list[tuple[float, float]]:
    """Returns start and end of what ran on the device: kernels, and copies."""
    events: Any = profiler.events() or []
    return [
        (event.time_range.start, event.time_range.end) for event in events if str(event.device_type).endswith("CUDA")
    ]


def measure_replays(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Sets the engine's steady step against the replay of the very graph it ran, with the same inputs."""
    found: dict[str, Any] = {}
    for num_requests in plan.replay_batches:
        batch = engine.start(engine.prompts(num_requests, plan.idle_prompt_len), _many(engine, plan))
        batch.wait_for_tokens(4)
        steady_s = time.perf_counter()  # until now prompts were computed between the tokens
        time.sleep(plan.idle_s)
        batch.cancel()  # all in one step, so that the graph's inputs are those of a full batch
        step_s = _steady_gap_s(batch, steady_s)
        record: dict[str, Any] = {"step_ms": significant(step_s * 1e3)}
        if engine.graphs is not None:
            replay_s = Spread.of(_replay_s(engine.graphs, num_requests) for _ in range(plan.rounds))
            record["replay_ms"] = _millis([replay_s.median, replay_s.low, replay_s.high]).as_json()
            record["engine_of_replay"] = significant(replay_s.median / step_s)
        found[str(num_requests)] = record
    return found


def _steady_gap_s(batch: Batch, since_s: float) -> float:
    """Returns the usual time between tokens after a moment."""
    return statistics.median(gap for timeline in batch.timelines for gap in timeline.gaps_since(since_s))


def _many(engine: Engine, plan: Plan) -> int:
    return engine.facts.max_model_len - plan.idle_prompt_len - 1


def _replay_s(graphs: Any, num_rows: int, num_replays: int = 50) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graphs.replay(num_rows)
    start.record()
    for _ in range(num_replays):
        graphs.replay(num_rows)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / num_replays


def measure_throughput(engine: Engine, plan: Plan, seed: int = 0) -> dict[str, Any]:
    """Runs all requests at once."""
    prompts = engine.prompts(plan.requests, plan.prompt_len, seed=seed)
    started = time.perf_counter()
    timelines = engine.run(prompts, plan.output_len)
    seconds = time.perf_counter() - started
    first = [timeline.first_token_s for timeline in timelines]
    return {
        "seconds": significant(seconds),
        "output_tokens_per_s": significant(plan.requests * plan.output_len / seconds),
        "first_token_s": Spread.of(first).as_json(),
        "gap_ms": _millis([statistics.median(timeline.gaps_s) for timeline in timelines]).as_json(),
    }


def measure_start(engine: Engine, started_at: float) -> dict[str, Any]:
    """Returns what it took from the start of the process, at `time.time()` moment `started_at`, to a first token."""
    engine.run(engine.prompts(1, 16), 1)
    whole = time.time() - started_at
    return {
        "to_first_token_s": significant(whole),
        "weights_s": significant(engine.weights_s),
        "without_weights_s": significant(whole - engine.weights_s),
        "load_s": significant(engine.load_s),
    }


def _millis(seconds: Sequence[float]) -> Spread:
    return Spread.of(second * 1e3 for second in seconds)
