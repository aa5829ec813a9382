#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Linear layers over quantized weights beside bfloat16 and beside what memory gives, on a CPU, in one interleaved run.

    .venv/bin/python scripts/bench_quantized.py
    .venv/bin/python scripts/bench_quantized.py --shapes 1b --rows 1 --schemes w4a16-g128,w8a8 --rounds 20

A case is one layer's four projections (query, key and value; output; gate and up; down) of a Llama of that shape, as a
recorded program, over as many layers as 160 MB of weights: more than caches hold. One JSON line for each shape, rows
and scheme: ms for a layer, GB of packed weights a second, that over what a plain read of as many bytes gets in the same
run, GFLOP a second, and the speed over bfloat16's, round by round. `low` and `high` are the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench_target import percentile, where_measured
from wavetrain_kernels import ops
from wavetrain_kernels.cpu.build import find_compiler
from wavetrain_kernels.ops import AttentionMetadata, QuantizationScheme, QuantizedWeight
from wavetrain_kernels.ops.dispatch import choose_kernels, new_program
from wavetrain_kernels.packed_weight import PackedWeight

CPU = torch.device("cpu")
BFLOAT16 = "bf16"
WEIGHT_BYTES = 160 << 20
MOST_LAYERS = 40
# Hidden size, width of a feed-forward unit, width of queries, of keys and values.
SHAPES = {"1b": (2048, 8192, 2048, 512), "129m": (768, 3072, 768, 256)}


def schemes(group_size: int | None) -> dict[str, QuantizationScheme]:
    """Returns schemes by name; `group_size` is of those with one scale for a row: all inputs."""
    whole = group_size or 1 << 20
    return {
        "w4a16-g128": QuantizationScheme(values="int4", group_size=128),
        "w4a16-g32-asym": QuantizationScheme(values="int4", group_size=32, has_offsets=True),
        "w4a8-g128": QuantizationScheme(values="int4", group_size=128, inputs="int8", input_group_size=128),
        "w4a8-g32-asym": QuantizationScheme(
            values="int4", group_size=32, has_offsets=True, inputs="int8", input_group_size=32
        ),
        "nf4-g64": QuantizationScheme(values="int4", group_size=64, has_codebook=True),
        "w8a16": QuantizationScheme(values="int8", group_size=whole),
        "w8a8-g128": QuantizationScheme(values="int8", group_size=whole, inputs="int8", input_group_size=128),
        "w8a8": QuantizationScheme(values="int8", group_size=whole, inputs="int8"),
        "fp8": QuantizationScheme(values="fp8", group_size=whole, inputs="fp8"),
    }


def random_quantized(scheme: QuantizationScheme, num_outputs: int, num_inputs: int) -> QuantizedWeight:
    """Returns a weight of numbers that are about as large as 1 / sqrt(num_inputs), scales as float16 has them."""
    scheme = dataclasses.replace(scheme, group_size=min(scheme.group_size, num_inputs))
    grid = (num_outputs, -(-num_inputs // scheme.group_size))
    if scheme.values == "int4":
        values = torch.randint(256, (num_outputs, num_inputs // 2), dtype=torch.uint8)
    elif scheme.values == "int8":
        values = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    else:
        values = (torch.randn(num_outputs, num_inputs) * 30).to(torch.float8_e4m3fn)
    typical = {"int4": 0.5 if scheme.has_codebook else 4.6, "int8": 73.0, "fp8": 30.0}[scheme.values]
    size = num_inputs**-0.5 / typical
    return QuantizedWeight(
        scheme=scheme,
        in_features=num_inputs,
        values=values,
        scales=((torch.rand(grid) + 0.5) * size).half().float(),
        offsets=torch.randn(grid) * size * typical if scheme.has_offsets else None,
        codebook=torch.linspace(-1, 1, 16) if scheme.has_codebook else None,
    )


class Case:
    """A stack of layers of one shape and scheme, to be run with some numbers of rows."""

    def __init__(self, shape: str, name: str, most_rows: int) -> None:
        hidden, inner, queries, keys = SHAPES[shape]
        # Outputs and inputs of each projection.
        sizes = [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]
        self.name = name
        sources = [_source(name, *size) for size in sizes]
        self.layers: list[list[PackedWeight]] = []
        while sum(map(layer_bytes, self.layers)) < WEIGHT_BYTES and len(self.layers) < MOST_LAYERS:
            self.layers.append([_pack(source, is_gated=place == 2) for place, source in enumerate(sources)])
        self.bytes_per_layer = layer_bytes(self.layers[0])
        self.products_per_row = sum(a * b for a, b in sizes)
        self._x = torch.randn(most_rows, hidden).bfloat16()
        self._queries = queries

    def timer(self, num_rows: int, num_layers: int) -> Callable[[], float]:
        """Returns what runs so many layers and returns the seconds for one of them."""
        x = self._x[:num_rows].clone()
        program = new_program(CPU, num_rows, torch.bfloat16)
        assert program is not None, "the compiled kernels record programs of bfloat16"
        layers = self.layers[:num_layers]
        with program.record():
            for layer in layers:
                self._layer(x, layer)
        token_ids, positions, metadata = step_of(num_rows)
        return lambda: _seconds(lambda: program.run(token_ids, positions, metadata)) / len(layers)

    def _layer(self, x: Tensor, layer: list[PackedWeight]) -> None:
        wide = ops.linear(x, layer[0])
        hidden = ops.linear(wide[:, : self._queries], layer[1])
        ops.linear(ops.gated_linear(hidden, layer[2], "silu"), layer[3])


def layer_bytes(layer: list[PackedWeight]) -> int:
    """Returns what a layer's packed weights take."""
    return sum(_bytes(weight) for weight in layer)


def main() -> None:
    """Parses the arguments, measures, prints."""
    names = [BFLOAT16, *schemes(None)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated: 1b, 129m")
    parser.add_argument("--rows", default="1,16,512", help="comma-separated (%(default)s)")
    parser.add_argument("--schemes", default=",".join(names[1:]), help=f"comma-separated: {', '.join(names[1:])}")
    parser.add_argument("--rounds", type=int, default=9, help="times that all schemes take turns (%(default)s)")
    parser.add_argument("--threads", type=int, help="default: as torch takes them")
    parser.add_argument("--cache-dir", default="/tmp/wavetrain-kernels", help="of compiled kernels (%(default)s)")
    args = parser.parse_args()
    unknown = {*args.schemes.split(",")} - {*names} | ({*args.shapes.split(",")} - {*SHAPES})
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [int(count) for count in args.rows.split(",")]
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        choose_kernels("cpu", CPU, Path(args.cache_dir))
        memory = _memory(Path(folder))
        for shape in args.shapes.split(","):
            cases = [Case(shape, name, max(rows)) for name in [BFLOAT16, *args.schemes.split(",")]]
            for num_rows in rows:
                _measure(shape, cases, num_rows, args.rounds, memory)


def _measure(shape: str, cases: list[Case], num_rows: int, rounds: int, memory: Callable[[], float]) -> None:
    # With many rows reading weights takes no time that counts.
    timers = [case.timer(num_rows, len(case.layers) if num_rows < 64 else 1) for case in cases]
    for timer in timers:
        timer()
    times, speeds = [[] for _ in cases], []
    for number in range(rounds):
        order = range(len(cases)) if number % 2 else reversed(range(len(cases)))
        for at in order:
            times[at].append(timers[at]())
        speeds.append(memory())
    read = statistics.median(speeds)
    for case, taken in zip(cases, times, strict=True):
        seconds = statistics.median(taken)
        ratios = [base / own for base, own in zip(times[0], taken, strict=True)]
        line = {
            "shape": shape,
            "rows": num_rows,
            "scheme": case.name,
            "layers": len(case.layers),
            "ms": spread([second * 1e3 for second in taken]),
            "gb_per_s": round(case.bytes_per_layer / seconds / 1e9, 1),
            "of_read": round(case.bytes_per_layer / seconds / 1e9 / read, 2),
            "read_gb_per_s": round(read, 1),
            "gflop_per_s": round(2 * case.products_per_row * num_rows / seconds / 1e9, 1),
            "over_bf16": spread(ratios),
            "rounds": rounds,
        }
        print(json.dumps({**line, **where_measured(), "threads": torch.get_num_threads()}), flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, and the 10th and 90th percentile."""
    return {
        "median": round(statistics.median(values), 3),
        "low": round(percentile(values, 10), 3),
        "high": round(percentile(values, 90), 3),
    }


def _source(name: str, num_outputs: int, num_inputs: int) -> Tensor | QuantizedWeight:
    if name == BFLOAT16:
        return (torch.randn(num_outputs, num_inputs) * num_inputs**-0.5).bfloat16()
    return random_quantized(schemes(num_inputs)[name], num_outputs, num_inputs)


def _pack(source: Tensor | QuantizedWeight, *, is_gated: bool) -> PackedWeight:
    if isinstance(source, Tensor):
        return ops.pack_weight(source, is_gated=is_gated)
    return ops.pack_quantized(source, dtype=torch.bfloat16, is_gated=is_gated)


def _bytes(weight: PackedWeight) -> int:
    data = getattr(weight.data, "panels", weight.data)
    tensors = [data] if isinstance(data, Tensor) else [data.values, data.scales]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def step_of(num_rows: int) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """Returns what a program is run with, of layers that attend to nothing: token ids, positions, metadata."""
    places = torch.arange(num_rows)
    tables = torch.zeros(1, 1, dtype=torch.int32)
    return places, places, AttentionMetadata.build([num_rows], [num_rows], tables, places)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _memory(folder: Path) -> Callable[[], float]:
    """Returns what measures how fast memory is read, in GB a second."""
    compiler = find_compiler()
    if compiler is None:
        sys.exit("a C++ compiler is needed, as for the kernels")
    program = folder / "read_bandwidth"
    source = Path(__file__).with_name("peers") / "read_bandwidth.c"
    c_compiler = compiler.replace("clang++", "clang").replace("g++", "gcc").replace("c++", "cc")
    subprocess.run([c_compiler, "-O3", "-march=native", "-pthread", "-o", str(program), str(source)], check=True)
    command = [str(program), str(WEIGHT_BYTES), str(torch.get_num_threads())]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = worker.stdin, worker.stdout
    assert stdin is not None, "a pipe was asked for"
    assert stdout is not None, "a pipe was asked for"
    num_bytes = json.loads(stdout.readline())["bytes"]

    def measure() -> float:
        stdin.write("{}\n")
        stdin.flush()
        return num_bytes / json.loads(stdout.readline())["seconds"] / 1e9

    return measure


if __name__ == "__main__":
    main()
