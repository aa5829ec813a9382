#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The served engine against the bare one: tokens/s, TTFT, ITL and processor time through the real Triton server.

    .venv/bin/python scripts/make_random_model.py --shape 129m --out /tmp/m-129m
    .venv/bin/python scripts/bench_server.py --model /tmp/m-129m

The offline engine runs in this process, the server beside it on the same cores, with the client; rounds alternate
and only one of them works at a time. Every stream must bring every token before its time counts. Then one request at
a time, both ways in turn: what the server adds to an idle engine's TTFT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench_target import Target, percentile, started_target, where_measured
from process_cpu import cpu_seconds
from wavetrain_client import AsyncClient
from wavetrain_engine import LLM, SamplingParams


@dataclass(frozen=True)
class Round:
    """One timed run of all streams through the server; `cpu_s` by process."""

    num_tokens: int
    num_responses: int
    seconds: float
    ttft_ms: list[float]
    itl_ms: list[float]
    cpu_s: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all streams by the whole run's time."""
        return self.num_tokens / self.seconds


# Threads that have just computed spin for a while, on cores that the next engine needs.
_REST_S = 0.1


class Bench:
    """Both engines, asked for the same work."""

    def __init__(self, llm: LLM, target: Target, args: argparse.Namespace) -> None:
        self._llm = llm
        self._target = target
        self._args = args
        self._rng = np.random.default_rng(0)

    async def run(self) -> None:
        """Prints one JSON line per number of streams, then one about TTFT."""
        args = self._args
        async with AsyncClient(self._target.url) as client:
            for streams in args.streams:
                await self._served_round(client, self._prompts(streams))
                self._bare_round(self._prompts(streams))
                bare, served = [], []
                for _ in range(args.rounds):
                    prompts = self._prompts(streams)
                    bare.append(self._bare_round(prompts))
                    served.append(await self._served_round(client, prompts))
                self._print(_summary(bare, served), case=f"{streams}x{args.num_in}x{args.num_out}")
            if args.ttft_repeats:
                self._print(await self._idle_ttft(client), case=f"1x{args.num_in}x{args.num_out}, idle")

    def _prompts(self, count: int) -> list[str]:
        high = min(self._llm.facts.vocab_size, 8000)
        return [self._llm.tokenizer.decode(self._rng.integers(300, high, self._args.num_in)) for _ in range(count)]

    def _bare_round(self, prompts: list[str]) -> float:
        """Returns output tokens per second."""
        params = SamplingParams(temperature=0, max_tokens=self._args.num_out, ignore_eos=True)
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

    async def _served_round(self, client: AsyncClient, prompts: list[str]) -> Round:
        ttft, gaps, counts = [], [], []
        before = self._cpu_seconds()
        start = time.perf_counter()
        for ttft_ms, gaps_ms, count in await asyncio.gather(*(self._stream(client, prompt) for prompt in prompts)):
            ttft.append(ttft_ms)
            gaps += gaps_ms
            counts.append(count)
        seconds = time.perf_counter() - start
        if any(count != self._args.num_out for count in counts):
            raise SystemExit(f"a stream lost tokens: {counts}")
        spent = {name: value - before[name] for name, value in self._cpu_seconds().items()}
        return Round(sum(counts), len(ttft) + len(gaps), seconds, ttft, gaps, spent)

    async def _stream(self, client: AsyncClient, prompt: str) -> tuple[float, list[float], int]:
        """Returns TTFT, the gaps between responses with tokens, and the number of tokens."""
        start = last = time.perf_counter()
        ttft_ms, gaps_ms, count = 0.0, [], 0
        model, num_out = self._args.triton_model, self._args.num_out
        async for chunk in client.stream(prompt, model=model, max_tokens=num_out, temperature=0, ignore_eos=True):
            if not chunk.num_output_tokens:
                continue
            now = time.perf_counter()
            if count:
                gaps_ms.append((now - last) * 1e3)
            else:
                ttft_ms = (now - start) * 1e3
            count += chunk.num_output_tokens
            last = now
        return ttft_ms, gaps_ms, count

    def _cpu_seconds(self) -> dict[str, float]:
        # The bare engine lives in the client's process, but rests while streams run.
        return {**cpu_seconds(self._target.pid), "client": time.process_time()}

    async def _idle_ttft(self, client: AsyncClient) -> dict[str, object]:
        """One request at a time, by the bare engine and by the server; each prompt is new to both.

        Who comes first changes from prompt to prompt: each finds the caches as the other has left them.
        """
        bare_ms: list[float] = []
        served_ms: list[float] = []
        for number, prompt in enumerate(self._prompts(self._args.ttft_repeats)):
            for is_served in (number % 2 == 0, number % 2 == 1):
                await asyncio.sleep(_REST_S)
                if is_served:
                    served_ms.append((await self._stream(client, prompt))[0])
                else:
                    bare_ms.append(self._bare_ttft_ms(prompt))
        return {
            "benchmark": "idle_ttft",
            "bare_ttft_ms": round(statistics.median(bare_ms), 2),
            "server_ttft_ms": round(statistics.median(served_ms), 2),
            "added_ms": round(statistics.median(np.subtract(served_ms, bare_ms)), 2),
            "repeats": len(bare_ms),
        }

    def _bare_ttft_ms(self, prompt: str) -> float:
        start = time.perf_counter()
        self._llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        return (time.perf_counter() - start) * 1e3

    def _print(self, result: dict[str, object], *, case: str) -> None:
        names = {"benchmark": result.pop("benchmark"), "model": self._target.served}
        line = {**names, "triton_model": self._args.triton_model, "case": case, **result, **where_measured()}
        print(json.dumps(line), flush=True)


def _summary(bare: list[float], served: list[Round]) -> dict[str, object]:
    """Medians and spreads over the rounds."""
    ratios = [one.tokens_per_s / tokens_per_s for one, tokens_per_s in zip(served, bare, strict=True)]
    ttft = [value for one in served for value in one.ttft_ms]
    itl = [value for one in served for value in one.itl_ms]
    num_tokens = sum(one.num_tokens for one in served)
    cpu_s = {name: sum(one.cpu_s[name] for one in served) for name in served[0].cpu_s}
    return {
        "benchmark": "server_vs_bare",
        "bare_tokens_per_s": round(statistics.median(bare), 1),
        "server_tokens_per_s": round(statistics.median(one.tokens_per_s for one in served), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ttft_ms_p50": round(percentile(ttft, 50), 1),
        "ttft_ms_p99": round(percentile(ttft, 99), 1),
        "itl_ms_p50": round(percentile(itl, 50), 2),
        "itl_ms_p99": round(percentile(itl, 99), 2),
        "tokens_per_response": round(num_tokens / sum(one.num_responses for one in served), 2),
        "cpu_us_per_token": {name: round(value / num_tokens * 1e6, 1) for name, value in cpu_s.items()},
    }


def main() -> None:
    """Parses the arguments and runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--triton-model", default="llm", choices=("llm", "ensemble"))
    parser.add_argument("--streams", type=lambda text: [int(item) for item in text.split(",")], default=[16, 32])
    parser.add_argument("--num-in", type=int, default=64, help="tokens of a prompt, about")
    parser.add_argument("--num-out", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ttft-repeats", type=int, default=50, help="requests one by one for the idle TTFT; 0: none")
    parser.add_argument("serve_flags", nargs="*", help="after --: flags for `wavetrain serve`")
    args = parser.parse_args()
    flags = ["--no-enable-prefix-caching", *args.serve_flags]
    with (
        LLM(model=str(args.model), enable_prefix_caching=False) as llm,
        started_target(str(args.model), flags) as target,
    ):
        asyncio.run(Bench(llm, target, args).run())


if __name__ == "__main__":
    main()
