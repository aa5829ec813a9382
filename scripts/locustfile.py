# SPDX-License-Identifier: Apache-2.0
"""Users for locust that stream text over gRPC: TTFT, ITL and whole requests as events of their own.

    locust -f scripts/locustfile.py --headless -u 32 -r 32 -t 60s --host 127.0.0.1:8001 --html reports/locust.html

Locust runs on gevent: gRPC is told so before its first channel, and then the blocking client works in greenlets.
Importing this file does that to the process, so nothing but locust should.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import grpc.experimental.gevent
from locust import User, constant, events, task

from bench_target import make_prompts, percentile
from wavetrain_client import Client, ClientError

grpc.experimental.gevent.init_gevent()


class Measurements:
    """What the users of this process saw; locust's own percentiles are rounded to two digits."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.ttft_ms: list[float] = []
        self.itl_ms: list[float] = []
        self.num_tokens = 0
        self.num_requests = 0
        self.num_failures = 0

    def summary(self) -> dict[str, Any]:
        """Returns the figures since the start."""
        seconds = time.perf_counter() - self.started_s
        return {
            "seconds": round(seconds, 1),
            "num_requests": self.num_requests,
            "num_failures": self.num_failures,
            "tokens_per_s": round(self.num_tokens / seconds, 1),
            "requests_per_s": round(self.num_requests / seconds, 2),
            "ttft_ms_p50": round(percentile(self.ttft_ms, 50), 1),
            "ttft_ms_p99": round(percentile(self.ttft_ms, 99), 1),
            "itl_ms_p50": round(percentile(self.itl_ms, 50), 2),
            "itl_ms_p99": round(percentile(self.itl_ms, 99), 2),
        }


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """Adds what a person may choose beside locust's own arguments."""
    parser.add_argument("--triton-model", default="llm", help="llm or ensemble")
    parser.add_argument("--max-tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--num-words", type=int, default=100, help="words in a prompt")
    parser.add_argument("--num-prompts", type=int, default=64, help="different prompts")
    parser.add_argument("--summary", default="", help="file for the figures, as JSON")


@events.test_start.add_listener
def start(environment: Any, **_: Any) -> None:
    """Begins the measurement, and says where a server has to be."""
    environment.measurements = Measurements()
    if not environment.host:
        raise SystemExit("name the server: --host 127.0.0.1:8001 (its gRPC port)")


@events.test_stop.add_listener
def stop(environment: Any, **_: Any) -> None:
    """Prints the figures, and writes them where the caller wants them."""
    summary = environment.measurements.summary()
    print(json.dumps(summary))
    if environment.parsed_options.summary:
        Path(environment.parsed_options.summary).write_text(json.dumps(summary), encoding="utf-8")


class StreamingUser(User):
    """Sends a prompt, reads the stream to its end, and begins again."""

    wait_time = constant(0)
    _turns = itertools.count()

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.client = Client(self.environment.host)
        self.prompts = make_prompts(options.num_prompts, options.num_words)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def generate(self) -> None:
        options = self.environment.parsed_options
        prompt = self.prompts[next(self._turns) % len(self.prompts)]
        start_s = last_s = time.perf_counter()
        num_tokens = 0
        error: Exception | None = None
        try:
            for chunk in self.client.stream(
                prompt, model=options.triton_model, max_tokens=options.max_tokens, ignore_eos=True, temperature=0.0
            ):
                now_s = time.perf_counter()
                if chunk.num_output_tokens:
                    self._note("ITL" if num_tokens else "TTFT", now_s - last_s)
                    num_tokens += chunk.num_output_tokens
                    last_s = now_s
            if num_tokens != options.max_tokens:
                error = RuntimeError(f"{num_tokens} tokens came instead of {options.max_tokens}")
        except ClientError as failure:
            error = failure
        self._finish(start_s, num_tokens, error)

    def _note(self, kind: str, seconds: float) -> None:
        measurements: Measurements = self.environment.measurements
        (measurements.ttft_ms if kind == "TTFT" else measurements.itl_ms).append(seconds * 1e3)
        self._fire(kind, seconds, 1, None)

    def _finish(self, start_s: float, num_tokens: int, error: Exception | None) -> None:
        measurements: Measurements = self.environment.measurements
        measurements.num_requests += 1
        measurements.num_failures += error is not None
        measurements.num_tokens += num_tokens
        self._fire("generate", time.perf_counter() - start_s, num_tokens, error)

    def _fire(self, kind: str, seconds: float, num_tokens: int, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=self.environment.parsed_options.triton_model,
            response_time=seconds * 1e3,
            response_length=num_tokens,
            exception=error,
            context={},
        )
