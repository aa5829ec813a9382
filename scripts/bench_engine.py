#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Wavetrain's offline engine on cases NxIxO, with the same JSON lines as the peers' programs in scripts/peers.

    .venv/bin/python scripts/make_random_model.py --shape 129m --out /tmp/m-129m
    .venv/bin/python scripts/bench_engine.py --model /tmp/m-129m
    .venv/bin/python scripts/bench_engine.py --model /tmp/m-129m --decode --cases 16x80x48,16x2000x48
    .venv/bin/python scripts/bench_engine.py --model /tmp/m-129m --max-num-batched-tokens 512 --dtype float32

A case is N requests at once with I prompt tokens and exactly O output tokens each, greedy. Every option of the engine
is a flag here too; the prefix cache is off unless --enable-prefix-caching turns it on.
"""

from __future__ import annotations

import argparse
import queue
import time
from typing import Any

from peers.engine_program import KV_CACHE_GIB, add_arguments, run
from wavetrain_cli.engine_flags import add_engine_flags
from wavetrain_engine import LLM, SamplingParams
from wavetrain_engine.config import engine_options
from wavetrain_engine.request import EngineRequest, RequestUpdate


class Wavetrain:
    """An LLM, asked with token ids."""

    name = "wavetrain"

    def __init__(self, model: str, flags: dict[str, Any]) -> None:
        room = {} if "num_blocks" in flags else {"kv_cache_memory": KV_CACHE_GIB * 2**30}
        self._llm = LLM(model, **{"enable_prefix_caching": False, **room, **flags})
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        """See Engine."""
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], _params(num_out))
        return [list(output.outputs[0].token_ids) for output in outputs]

    def token_times(self, prompts: list[list[int]], num_out: int) -> list[list[float]]:
        """See Engine."""
        updates: queue.SimpleQueue[tuple[float, RequestUpdate]] = queue.SimpleQueue()
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            request_id = f"timed-{self._num_requests}"
            self._num_requests += 1
            times[request_id] = []
            request = EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling_params=_params(num_out))
            # The stream of updates that LLM collects, with the moments at which they come.
            self._llm._engine.submit(request, lambda update: updates.put((time.perf_counter(), update)))
        num_running = len(times)
        while num_running:
            now, update = updates.get()
            times[update.request_id] += [now] * len(update.new_token_ids)
            num_running -= update.finish_reason is not None
        return list(times.values())


def _params(num_out: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)


def _load(args: argparse.Namespace) -> Wavetrain:
    return Wavetrain(args.model, {name: value for name, value in vars(args).items() if name in _flags()})


def _flags() -> set[str]:
    return set(engine_options()) - {"model"}


def main() -> None:
    """Parses the arguments and measures, or works."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    add_engine_flags(parser)
    run(_load, parser.parse_args())


if __name__ == "__main__":
    main()
