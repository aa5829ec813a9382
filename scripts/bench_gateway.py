#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the gateway costs: server-sent events through it over direct gRPC streams, on the same server.

    .venv/bin/python scripts/bench_gateway.py --streams 16 64 --tokens 128 --rounds 12

Only one way works at a time; server, gateway and client share the cores. A round is four runs, direct, gateway,
gateway, direct, and the next one the other way about, so that a machine which slows down meanwhile slows both alike. A
round's ratio is the time of its direct runs over that of its gateway runs; `ratio` is the median of all rounds,
`ratio_quartiles` its spread, and `control` the same of a round's two direct runs: what noise alone makes. Every stream
must bring every token before its time counts. Then one request at a time, both ways in turn: what the gateway adds to
an idle server's time to the first token. One JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_target import Target, make_prompts, percentile, started_target, where_measured
from wavetrain_client import AsyncClient

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MODEL = "bench"


@dataclass(frozen=True)
class Round:
    """One timed run of all streams."""

    num_tokens: int
    num_events: int
    seconds: float
    ttft_ms: list[float]
    gateway_cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all streams by the whole run's time."""
        return self.num_tokens / self.seconds


class Way:
    """One way to the server: direct, or through the gateway at a port."""

    def __init__(self, name: str, url: str, *, port: int = 0, gateway_pid: int = 0) -> None:
        self.name = name
        self._url, self._port, self._gateway_pid = url, port, gateway_pid

    async def run(self, prompts: list[str], num_tokens: int) -> Round:
        """Streams all prompts at once; each must bring every token."""
        began_cpu_s = self._cpu_s()
        began_s = time.perf_counter()
        if self._port:
            found = await asyncio.gather(*[self._events(prompt, num_tokens, began_s) for prompt in prompts])
        else:
            async with AsyncClient(self._url) as client:
                found = await asyncio.gather(*[_chunks(client, prompt, num_tokens, began_s) for prompt in prompts])
        seconds = time.perf_counter() - began_s
        counts = [item[0] for item in found]
        if set(counts) != {num_tokens}:
            raise SystemExit(f"{self.name}: streams brought {sorted(set(counts))} tokens in place of {num_tokens}")
        return Round(
            num_tokens=sum(counts),
            num_events=sum(item[1] for item in found),
            seconds=seconds,
            ttft_ms=[item[2] for item in found],
            gateway_cpu_s=self._cpu_s() - began_cpu_s,
        )

    async def _events(self, prompt: str, num_tokens: int, began_s: float) -> tuple[int, int, float]:
        """A client that does as little as it can, so that it is not what is measured."""
        body = {
            "model": _MODEL,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_events, ttft_ms, usage = 0, 0.0, {}
        async for event in _post(self._port, json.dumps(body).encode()):
            if not num_events:
                ttft_ms = (time.perf_counter() - began_s) * 1000
            num_events += 1
            if b'"usage"' in event:
                usage = json.loads(event)["usage"]
        return usage["completion_tokens"], num_events - 2, ttft_ms

    def _cpu_s(self) -> float:
        if not self._gateway_pid:
            return 0.0
        fields = Path(f"/proc/{self._gateway_pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


async def _post(port: int, body: bytes) -> AsyncIterator[bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"the gateway answers {status!r}: {(await reader.read(2000))!r}")
        while line := await reader.readline():
            if line.startswith(b"data: "):
                yield line[6:].strip()
    finally:
        writer.close()


async def _chunks(client: AsyncClient, prompt: str, num_tokens: int, began_s: float) -> tuple[int, int, float]:
    count, num_chunks, ttft_ms = 0, 0, 0.0
    async for chunk in client.stream(prompt, max_tokens=num_tokens, ignore_eos=True, temperature=0):
        if not num_chunks:
            ttft_ms = (time.perf_counter() - began_s) * 1000
        num_chunks += 1
        count += chunk.num_output_tokens or 0
    return count, num_chunks, ttft_ms


@contextmanager
def started_gateway(target: Target) -> Iterator[tuple[int, int]]:
    """Yields the port and the process id of a gateway in front of the target."""
    command = [str(Path(sys.executable).with_name("wavetrain")), "gateway", "--port", "0", "--upstream", target.url]
    command += ["--served-model-name", _MODEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as gateway:
        try:
            line = gateway.stdout.readline() if gateway.stdout is not None else ""
            if "ready on" not in line:
                raise SystemExit(f"the gateway did not start: {line!r}")
            yield int(line.rsplit(":", 1)[1].split("/")[0]), gateway.pid
        finally:
            gateway.terminate()


def compare(direct: list[Round], through: list[Round]) -> dict[str, object]:
    """What two runs of each way in every round say, in order."""
    pairs = list(zip(_in_twos(direct), _in_twos(through), strict=True))
    ratios = sorted(sum(item.seconds for item in one) / sum(item.seconds for item in other) for one, other in pairs)
    control = sorted(first.seconds / second.seconds for first, second in _in_twos(direct))
    num_tokens = sum(item.num_tokens for item in through)
    return {
        "direct_tokens_per_s": round(statistics.median(item.tokens_per_s for item in direct), 1),
        "gateway_tokens_per_s": round(statistics.median(item.tokens_per_s for item in through), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(percentile(ratios, percent), 3) for percent in (25, 75)],
        "control": round(statistics.median(control), 3),
        "control_quartiles": [round(percentile(control, percent), 3) for percent in (25, 75)],
        "gateway_cpu_us_per_token": round(1e6 * sum(item.gateway_cpu_s for item in through) / num_tokens, 1),
        "tokens_per_event": round(num_tokens / sum(item.num_events for item in through), 2),
    }


def _in_twos(rounds: list[Round]) -> list[tuple[Round, Round]]:
    return list(zip(rounds[::2], rounds[1::2], strict=True))


async def measure(ways: list[Way], args: argparse.Namespace) -> dict[str, object]:
    """Alternates between the ways, for each number of streams, then one request at a time."""
    prompts = make_prompts(max(args.streams), args.num_words)
    results: dict[str, object] = {}
    for num_streams in args.streams:
        for way in ways:
            await way.run(prompts[:num_streams], args.tokens)
        rounds: dict[str, list[Round]] = {way.name: [] for way in ways}
        for number in range(args.rounds):
            first, second = ways if number % 2 else reversed(ways)
            for way in (first, second, second, first):
                rounds[way.name].append(await way.run(prompts[:num_streams], args.tokens))
        results[f"{num_streams} streams"] = compare(rounds["direct"], rounds["gateway"])
    idle: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(args.idle_requests):
        for way in ways if number % 2 else reversed(ways):
            idle[way.name] += (await way.run(prompts[:1], 1)).ttft_ms
    results["idle_ttft_ms"] = {name: round(percentile(found, 50), 2) for name, found in idle.items()}
    return results


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", help="checkpoint to serve; the demo model without it")
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each stream (%(default)s)")
    parser.add_argument("--num-words", type=int, default=32, help="words in a prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of two runs of each way (%(default)s)")
    parser.add_argument("--idle-requests", type=int, default=40)
    parser.add_argument("serve_flags", nargs="*", help="after --: flags for `wavetrain serve`")
    args = parser.parse_args()
    with started_target(args.model_dir, args.serve_flags) as target, started_gateway(target) as (port, pid):
        ways = [Way("direct", target.url), Way("gateway", target.url, port=port, gateway_pid=pid)]
        results = asyncio.run(measure(ways, args))
    print(json.dumps({"served": target.served, **results, **where_measured()}))


if __name__ == "__main__":
    main()
