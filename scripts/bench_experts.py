#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of quantized experts beside bfloat16 ones, on a CPU, in one interleaved run.

    .venv/bin/python scripts/bench_experts.py
    .venv/bin/python scripts/bench_experts.py --rows 1,16,512 --hidden 2048 --units 768 --experts 64 --top-k 8
    .venv/bin/python scripts/bench_experts.py --threads 1 --processor-time     # on a machine that others use too

A case is the feed-forward half of a Qwen3-MoE's layer, router included, as a recorded program over as many layers as
400 MB of bfloat16 experts: more than caches hold, whatever they are held in. Each row goes to experts of its own. One
JSON line for each number of rows and scheme: ms for a layer, bytes of its packed experts, GB a second of those that
the rows went to, and the speed over bfloat16's, round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench_quantized import BFLOAT16, CPU, random_quantized, schemes, spread, step_of
from bench_target import where_measured
from wavetrain_kernels import ops
from wavetrain_kernels.ops import PackedExperts, PackedWeight, QuantizedWeight
from wavetrain_kernels.ops.dispatch import choose_kernels, new_program

WEIGHT_BYTES = 400 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a layer."""

    num_experts: int
    top_k: int
    hidden: int
    units: int

    @property
    def values_per_expert(self) -> int:
        """Weights of both projections."""
        return 3 * self.hidden * self.units

    @property
    def num_layers(self) -> int:
        """As many as are no longer in any cache."""
        return max(1, WEIGHT_BYTES // (2 * self.num_experts * self.values_per_expert))


class Case:
    """Layers of one scheme, to be run with some numbers of rows."""

    def __init__(self, sizes: Sizes, name: str) -> None:
        self.name, self._sizes = name, sizes
        generator = torch.Generator().manual_seed(0)
        self._layers = [self._layer(generator) for _ in range(sizes.num_layers)]
        self.bytes_per_layer = sum(_bytes(experts) for experts in self._layers[0][1:])

    def _layer(self, generator: torch.Generator) -> tuple[PackedWeight, PackedExperts, PackedExperts]:
        sizes = self._sizes
        router = torch.randn(sizes.num_experts, sizes.hidden, generator=generator) * sizes.hidden**-0.5
        gate_up = self._experts(2 * sizes.units, sizes.hidden, is_gated=True)
        return ops.pack_weight(router.bfloat16()), gate_up, self._experts(sizes.hidden, sizes.units, is_gated=False)

    def _experts(self, rows: int, columns: int, *, is_gated: bool) -> PackedExperts:
        num_experts = self._sizes.num_experts
        if self.name == BFLOAT16:
            weight: Tensor | QuantizedWeight = (torch.randn(rows, columns) * columns**-0.5).bfloat16()
            experts = ops.empty_experts(num_experts, rows, columns, dtype=torch.bfloat16, device=CPU, is_gated=is_gated)
        else:
            weight = random_quantized(schemes(columns)[self.name], rows, columns)
            experts = ops.empty_quantized_experts(num_experts, weight, dtype=torch.bfloat16, is_gated=is_gated)
        for expert in range(num_experts):  # in memory of their own, whatever is in it
            ops.pack_expert(experts, expert, weight)
        return experts

    def timer(self, x: Tensor, clock: Callable[[], float]) -> Callable[[], float]:
        """Returns what runs all layers over rows x and returns the seconds for one of them."""
        num_rows = x.shape[0]
        program = new_program(CPU, num_rows, torch.bfloat16)
        assert program is not None, "the compiled kernels record programs of bfloat16"
        with program.record():
            for router, gate_up, down in self._layers:
                logits = ops.linear(x, router, dtype=torch.float32)
                weights, expert_ids = ops.route_experts(logits, self._sizes.top_k, renormalize=True)
                ops.fused_moe(x, gate_up, down, weights, expert_ids, "silu")
        token_ids, positions, metadata = step_of(num_rows)

        def seconds() -> float:
            start = clock()
            program.run(token_ids, positions, metadata)
            return (clock() - start) / len(self._layers)

        return seconds

    def used_experts(self, x: Tensor) -> float:
        """Returns how many experts of a layer the rows go to, on average."""
        routers = [layer[0] for layer in self._layers]
        chosen = [
            ops.route_experts(ops.linear(x, router, dtype=torch.float32), self._sizes.top_k, renormalize=True)[1]
            for router in routers
        ]
        return statistics.mean(len(ids.unique()) for ids in chosen)


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16", help="comma-separated (%(default)s)")
    parser.add_argument("--schemes", default="w4a16-g128,w8a16,w8a8,fp8", help="comma-separated (%(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="of a layer (%(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts of a row (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (%(default)s)")
    parser.add_argument("--units", type=int, default=512, help="of an expert (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="times that all schemes take turns (%(default)s)")
    parser.add_argument("--threads", type=int, help="default: as torch takes them")
    parser.add_argument("--processor-time", action="store_true", help="of this thread, in place of the clock's")
    parser.add_argument("--cache-dir", default="/tmp/wavetrain-kernels", help="of compiled kernels (%(default)s)")
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time is that of one thread: give --threads 1 too")
    clock = time.thread_time if args.processor_time else time.perf_counter
    names = args.schemes.split(",")
    if unknown := {*names} - {*schemes(None)}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = Sizes(args.experts, args.top_k, args.hidden, args.units)
    with torch.inference_mode():
        choose_kernels("cpu", CPU, Path(args.cache_dir))
        cases = [Case(sizes, name) for name in (BFLOAT16, *names)]
        for num_rows in map(int, args.rows.split(",")):
            _measure(sizes, cases, num_rows, args.rounds, clock)


def _measure(sizes: Sizes, cases: list[Case], num_rows: int, rounds: int, clock: Callable[[], float]) -> None:
    x = torch.randn(num_rows, sizes.hidden, generator=torch.Generator().manual_seed(num_rows)).bfloat16()
    timers, used = [case.timer(x, clock) for case in cases], cases[0].used_experts(x)
    for timer in timers:
        timer()
    times: list[list[float]] = [[] for _ in cases]
    for number in range(rounds):
        for at in range(len(cases)) if number % 2 else reversed(range(len(cases))):
            times[at].append(timers[at]())
    for case, taken in zip(cases, times, strict=True):
        read = case.bytes_per_layer * used / sizes.num_experts
        line = {
            "rows": num_rows,
            "scheme": case.name,
            "experts": f"{sizes.num_experts} of {sizes.hidden} x {sizes.units}, {sizes.top_k} a row",
            "used_experts": round(used, 1),
            "layers": sizes.num_layers,
            "mb_per_layer": round(case.bytes_per_layer / 1e6, 2),
            "ms": spread([second * 1e3 for second in taken]),
            "gb_per_s": round(read / statistics.median(taken) / 1e9, 1),
            "over_bf16": spread([base / own for base, own in zip(times[0], taken, strict=True)]),
            "rounds": rounds,
        }
        print(json.dumps({**line, **where_measured(), "threads": torch.get_num_threads()}), flush=True)


def _bytes(experts: PackedExperts) -> int:
    return experts.data.nbytes if isinstance(experts.data, Tensor) else experts.data.num_bytes


if __name__ == "__main__":
    main()
