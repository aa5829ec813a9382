#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What abusive requests cost everybody else at the gateway, and how soon the engine is free of one whose caller left.

    .venv/bin/python scripts/bench_gateway_abuse.py --repeats 5 --disconnects 20

Bodies, headers and WebSocket frames that are oversized, deep, wide or slow to check, each alone and eight at once.
Three figures, each the median over the repeats of the longest: processor time and wall time of one callback of the
gateway's event loop, and how long a bystander's GET /livez took meanwhile. On a busy machine the first is the one to
go by. Then callers that close their connection, in the middle of a stream and before a whole answer: the time until
the engine core has no request. Two tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_target import percentile, started_target, where_measured
from process_cpu import find_argument
from wavetrain_engine.ipc.core_stats import read_stats
from wavetrain_engine.ipc.runtime_dir import RuntimeDir
from wavetrain_gateway.assembly import build_gateway
from wavetrain_gateway.server import GatewayServer, listen_on
from wavetrain_gateway.settings import GatewaySettings

_MODEL = "bench"
_NUM_AT_ONCE = 8
_TIMEOUT_S = 60.0
_COMPLETIONS, _CHATS, _TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"


@dataclass(frozen=True)
class Payload:
    """Bytes to be sent on one connection. `frames` follow a WebSocket's handshake."""

    name: str
    data: bytes
    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a payload cost the others, in milliseconds."""

    callback_cpu_ms: float
    callback_ms: float
    bystander_ms: float
    statuses: str

    def __str__(self) -> str:
        """A row of the table."""
        figures = f"{self.callback_cpu_ms:>13.1f}{self.callback_ms:>10.1f}{self.bystander_ms:>11.1f}"
        return f"{figures}   {self.statuses}"


def bodies() -> dict[str, tuple[str, dict[str, Any] | bytes]]:
    """Name to path and body, each just within the gateway's megabyte."""
    user = {"role": "user", "content": "x"}
    return {
        "340,000 token ids": (_COMPLETIONS, {"prompt": [1] * 340_000}),
        "250,000 wrong token ids": (_COMPLETIONS, {"prompt": [-1] * 250_000}),
        "the last token id is wrong": (_COMPLETIONS, {"prompt": [1] * 300_000 + [-1]}),
        "200,000 lists of ids": (_COMPLETIONS, {"prompt": [[1]] * 200_000}),
        "256 prompts of 1,300 ids": (_COMPLETIONS, {"prompt": [[1] * 1300] * 256, "max_tokens": 1}),
        "256 prompts of 4,000 characters": (_COMPLETIONS, {"prompt": ["x" * 4000] * 256, "max_tokens": 1}),
        "200,000 texts": (_COMPLETIONS, {"prompt": ["x"] * 200_000}),
        "one text of a megabyte": (_COMPLETIONS, {"prompt": "x" * 1_000_000}),
        "a megabyte of escapes": (_COMPLETIONS, {"prompt": "\x01" * 170_000}),
        "a megabyte of surrogates": (_COMPLETIONS, {"prompt": "😀" * 87_000}),
        "75,000 fields": (_COMPLETIONS, {f"k{number}": 1 for number in range(75_000)}),
        "a name of a megabyte": (_COMPLETIONS, {"x" * 1_000_000: 1}),
        "4,096 biases": (_COMPLETIONS, {"logit_bias": {str(number): 1 for number in range(4096)}}),
        "80,000 biases": (_COMPLETIONS, {"logit_bias": {str(number): 1 for number in range(80_000)}}),
        "200,000 stop strings": (_COMPLETIONS, {"stop": ["x"] * 200_000}),
        "1,024 bad words": (_COMPLETIONS, {"prompt": "x", "bad_words": ["word " * 150] * 1024, "max_tokens": 1}),
        "an object 100,000 deep": (_COMPLETIONS, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a list 500,000 deep": (_COMPLETIONS, b'{"prompt":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        "a number of a million digits": (_COMPLETIONS, b'{"seed":' + b"9" * 1_000_000 + b"}"),
        "250,000 empty objects": (_COMPLETIONS, {"stream_options": {"a": [{}] * 250_000}}),
        "not JSON at its end": (_COMPLETIONS, b'{"prompt":[' + b"1," * 500_000),
        "25,000 messages": (_CHATS, {"messages": [user] * 25_000}),
        "2,048 messages of 480 characters": (_CHATS, {"messages": [{**user, "content": "x" * 480}] * 2048}),
        "one message of a megabyte": (_CHATS, {"messages": [{**user, "content": "x" * 1_000_000}]}),
        "2,048 messages, the last is wrong": (_CHATS, {"messages": [user] * 2047 + [{"role": "user"}]}),
        "20,000 parts of content": (
            _CHATS,
            {"messages": [{**user, "content": [{"type": "text", "text": "x"}] * 20_000}]},
        ),
        "2,000 messages of 8 parts": (
            _CHATS,
            {"messages": [{**user, "content": [{"type": "text", "text": "x"}] * 8}] * 2000, "max_tokens": 1},
        ),
        "128 tool calls with deep arguments": (
            _CHATS,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "f", "arguments": '{"a":' + "[" * 900 + "]" * 900 + "}"}}
                        ]
                        * 128,
                    }
                ]
            },
        ),
        "128 tools of 8 KB": (_CHATS, {"messages": [user], "tools": [{"a": ["x"] * 1600}] * 128}),
        "32 template variables of 30 KB": (
            _CHATS,
            {"messages": [user], "chat_template_kwargs": {f"v{number}": "x" * 30_000 for number in range(32)}},
        ),
        "a text of a megabyte to tokenize": (_TOKENIZE, {"prompt": "word " * 200_000}),
        "20,000 messages to tokenize": (_TOKENIZE, {"messages": [user] * 20_000}),
        "340,000 ids to detokenize": ("/detokenize", {"tokens": [1] * 340_000}),
    }


def payloads() -> list[Payload]:
    """All of them."""
    found = [_post(name, path, body) for name, (path, body) in bodies().items()]
    head = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"
    found += [
        Payload("30 KB of headers, 5,000 of them", head + b"a: b\r\n" * 5000 + b"\r\n"),
        Payload("a header of 1 MB", head + b"x: " + b"y" * 1_000_000 + b"\r\n\r\n"),
        Payload("200 pipelined requests", (head + b"\r\n") * 200),
        Payload("200 wrong keys, pipelined", (head + b"authorization: Bearer " + b"k" * 400 + b"\r\n\r\n") * 200),
        Payload("a query of 30 KB", b"GET /tokenizer_info?" + b"a=b&" * 7500 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"),
        Payload("a path of 30 KB", b"GET /v1/models/" + b"a/" * 15_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"),
        Payload("chunks of one byte", _chunked(b'{"prompt":"' + b"x" * 20_000 + b'"}')),
    ]
    frames = {
        "1 MB of a request": _frame_of({"prompt": [1] * 330_000}),
        "1 MB of nesting": b"[" * 1_000_000,
        "1 MB of objects": b'{"type":"x","body":[' + b"{}," * 330_000 + b"{}]}",
        "2,000 small ones": None,
    }
    for name, text in frames.items():
        sent = (_socket_frame(b'{"type":"cancel","id":"a"}'),) * 2000 if text is None else (_socket_frame(text),)
        found.append(Payload(f"WebSocket: {name}", _HANDSHAKE, sent))
    return found


_HANDSHAKE = (
    b"GET /v1/stream HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: " + base64.b64encode(b"0123456789abcdef") + b"\r\n\r\n"
)


def _frame_of(body: dict[str, Any]) -> bytes:
    frame = {"type": "request", "id": "a", "api": "completions", "body": {"model": _MODEL, **body}}
    return json.dumps(frame, separators=(",", ":")).encode()


def _socket_frame(text: bytes) -> bytes:
    """A client's text frame, masked with zeros."""
    length = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xff" + len(text).to_bytes(8, "big")
    return b"\x81" + length + b"\0\0\0\0" + text


def _post(name: str, path: str, body: dict[str, Any] | bytes) -> Payload:
    if not isinstance(body, bytes):
        body = json.dumps({"model": _MODEL, **body}, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    return Payload(name, head.encode() + b"x-request-timeout-ms: 5000\r\n\r\n" + body)


def _chunked(body: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body)
    return head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def serve_watched(upstream: str) -> None:
    """Runs a gateway whose event loop says, for each line that comes, how long its longest callback took."""
    longest = {"cpu": 0.0, "wall": 0.0}
    run_callback = asyncio.Handle._run

    def run_timed(handle: asyncio.Handle) -> None:
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        run_callback(handle)
        longest["cpu"] = max(longest["cpu"], time.thread_time() - cpu_s)
        longest["wall"] = max(longest["wall"], time.perf_counter() - wall_s)

    def report() -> None:
        print(json.dumps(longest), flush=True)
        longest.update(cpu=0.0, wall=0.0)

    async def run() -> None:
        settings = GatewaySettings.model_validate(
            {"upstreams": [upstream], "model": _MODEL, "log": {"access_log": False}}
        )
        listener = listen_on("127.0.0.1", 0)
        port, loop = listener.getsockname()[1], asyncio.get_running_loop()
        server = GatewayServer(build_gateway(settings), on_ready=lambda: print(port, flush=True))

        def answer() -> None:
            for _ in sys.stdin:
                loop.call_soon_threadsafe(report)
            loop.call_soon_threadsafe(server.stop)

        threading.Thread(target=answer, daemon=True).start()
        await server.serve([listener])

    asyncio.Handle._run = run_timed  # type: ignore[method-assign]
    asyncio.run(run())


class Gateway:
    """The watched gateway, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self._line())

    def longest(self) -> tuple[float, float]:
        """Processor and wall time of the longest callback since the last call, in milliseconds."""
        if self._process.stdin is None:
            raise SystemExit("the gateway was started without pipes")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = json.loads(self._line())
        return found["cpu"] * 1000, found["wall"] * 1000

    def _line(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise SystemExit("the gateway ended")
        return line


@contextmanager
def started_gateway(upstream: str) -> Iterator[Gateway]:
    """Yields a watched gateway in a process of its own."""
    command = [sys.executable, __file__, "--watched-gateway", upstream]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Gateway(process)
        finally:
            process.terminate()


async def _answer_of(port: int, payload: Payload) -> str:
    """Sends a payload and waits for what it brings: the first status, or what a WebSocket's frame is answered with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        writer.write(payload.data)
        line = await asyncio.wait_for(reader.readline(), _TIMEOUT_S)
        for frame in payload.frames:
            writer.write(frame)
        if payload.frames:
            await asyncio.wait_for(reader.readuntil(b'"type"'), _TIMEOUT_S)
        else:
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _TIMEOUT_S)
        return line.split()[1].decode() if line else "closed"
    except (ConnectionError, asyncio.IncompleteReadError):
        return "closed"
    finally:
        writer.close()


class Bystander:
    """Asks for /livez all the time, on a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.longest_ms = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while True:
                began_s = time.perf_counter()
                writer.write(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
                await reader.readuntil(b"ok\n")
                self.longest_ms = max(self.longest_ms, (time.perf_counter() - began_s) * 1000)
                await asyncio.sleep(0.001)
        finally:
            writer.close()


async def cost_of(gateway: Gateway, payload: Payload, num_at_once: int, repeats: int) -> Cost:
    """Sends a payload again and again."""
    found: list[tuple[float, float, float]] = []
    statuses: set[str] = set()
    for _ in range(repeats):
        bystander = Bystander(gateway.port)
        asking = asyncio.ensure_future(bystander.run())
        await asyncio.sleep(0.01)
        gateway.longest()
        bystander.longest_ms = 0.0
        statuses |= set(await asyncio.gather(*[_answer_of(gateway.port, payload) for _ in range(num_at_once)]))
        await asyncio.sleep(0.01)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        found.append((*gateway.longest(), bystander.longest_ms))
    cpu_ms, wall_ms, bystander_ms = (statistics.median(column) for column in zip(*found, strict=True))
    return Cost(cpu_ms, wall_ms, bystander_ms, "/".join(sorted(statuses)))


async def cancel_ms(port: int, runtime_dir: RuntimeDir, *, is_streamed: bool, num_beside: int) -> float:
    """Leaves in the middle of a generation; returns the time until the core has one request fewer."""
    body = {"model": _MODEL, "prompt": "def", "max_tokens": 1900, "ignore_eos": True, "stream": is_streamed}
    sent = _post("", _COMPLETIONS, body).data.replace(b": 5000", b": 600000")
    writers: list[asyncio.StreamWriter] = []
    for _ in range(num_beside + 1):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        writer.write(sent)
        if is_streamed:
            await reader.readuntil(b"data: ")
        writers.append(writer)
    await _until(runtime_dir, num_beside + 1, is_less=False)
    writers.pop().close()
    left_s = time.perf_counter()
    await _until(runtime_dir, num_beside, is_less=True)
    taken_ms = (time.perf_counter() - left_s) * 1000
    for writer in writers:
        writer.close()
    await _until(runtime_dir, 0, is_less=True)
    return taken_ms


async def _until(runtime_dir: RuntimeDir, num_running: int, *, is_less: bool) -> None:
    deadline_s = time.perf_counter() + _TIMEOUT_S
    while True:
        stats = await asyncio.to_thread(read_stats, runtime_dir)
        running = stats.num_running + stats.num_waiting
        if running <= num_running if is_less else running >= num_running:
            return
        if time.perf_counter() > deadline_s:
            raise SystemExit(f"{running} requests run in place of {num_running}")


async def measure(gateway: Gateway, runtime_dir: RuntimeDir, args: argparse.Namespace) -> dict[str, Any]:
    """Both tables, printed as they come."""
    ready = Payload("", b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    while await _answer_of(gateway.port, ready) != "200":
        await asyncio.sleep(0.05)
    await cost_of(gateway, _post("", _COMPLETIONS, {"prompt": "x", "max_tokens": 1}), 1, 3)
    print(f"\n{'longest, ms':<40}{'callback cpu':>13}{'callback':>10}{'bystander':>11}   answers")
    costs: dict[str, dict[str, Any]] = {}
    chosen = [payload for payload in payloads() if not args.only or any(word in payload.name for word in args.only)]
    for payload in chosen:
        for num_at_once in (1, _NUM_AT_ONCE) if args.at_once else (1,):
            name = payload.name if num_at_once == 1 else f"  {num_at_once} at once"
            cost = await cost_of(gateway, payload, num_at_once, args.repeats)
            print(f"{name:<40}{cost}")
            costs[payload.name if num_at_once == 1 else f"{payload.name}, {num_at_once} at once"] = asdict(cost)
    cancels: dict[str, dict[str, float]] = {}
    print(f"\n{'caller left; the engine is free after, ms':<44}{'p50':>8}{'p99':>8}")
    for is_streamed, num_beside in ((True, 0), (False, 0), (True, args.beside)):
        taken = [
            await cancel_ms(gateway.port, runtime_dir, is_streamed=is_streamed, num_beside=num_beside)
            for _ in range(args.disconnects)
        ]
        name = "in the middle of a stream" if is_streamed else "before a whole answer"
        name += f", beside {num_beside}" if num_beside else ""
        cancels[name] = {"p50": round(percentile(taken, 50), 1), "p99": round(percentile(taken, 99), 1)}
        print(f"{name:<44}{cancels[name]['p50']:>8}{cancels[name]['p99']:>8}")
    return {"payloads": costs, "cancels": cancels}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", help="checkpoint to serve; the demo model without it")
    parser.add_argument("--repeats", type=int, default=5, help="of each payload (%(default)s)")
    parser.add_argument("--disconnects", type=int, default=20, help="callers that leave, of each kind (%(default)s)")
    parser.add_argument("--beside", type=int, default=16, help="streams beside the one that is left (%(default)s)")
    parser.add_argument("--at-once", action="store_true", help=f"each payload also {_NUM_AT_ONCE} times at once")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="payloads with one of these in their names")
    parser.add_argument("--watched-gateway", metavar="HOST:PORT", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.watched_gateway is not None:
        serve_watched(args.watched_gateway)
        return
    with started_target(args.model_dir, []) as target, started_gateway(target.url) as gateway:
        runtime_dir = RuntimeDir(Path(find_argument(target.pid, "--runtime-dir")))
        results = asyncio.run(measure(gateway, runtime_dir, args))
    print(json.dumps({"served": target.served, "load": os.getloadavg()[0], **results, **where_measured()}))


if __name__ == "__main__":
    main()
