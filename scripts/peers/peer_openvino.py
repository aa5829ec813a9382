# SPDX-License-Identifier: Apache-2.0
"""openvino-genai's ContinuousBatchingPipeline on the CPU, as a benchmark program.

    openvino/bin/python scripts/peers/peer_openvino.py --model models/129m-openvino

Everything but the cache's size and the step's is left as it comes: one stream, latency mode, pinned threads, and a KV
cache of 8 bits, which is its default on CPUs.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports]
import openvino_genai as ov_genai  # pyright: ignore[reportMissingImports]
from engine_program import KV_CACHE_GIB, MAX_BATCHED_TOKENS, add_arguments, run


class OpenVINO:
    """The pipeline, asked with token ids."""

    def __init__(self, model: str, precision: str, kv_precision: str | None, num_threads: int | None) -> None:
        self.name = f"openvino-{precision}" + (f"-kv-{kv_precision}" if kv_precision else "")
        scheduler = ov_genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_seqs = 256
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.enable_prefix_caching = False
        properties: dict[str, object] = {"INFERENCE_PRECISION_HINT": precision}
        if kv_precision:
            properties["KV_CACHE_PRECISION"] = kv_precision
        if num_threads:
            properties["INFERENCE_NUM_THREADS"] = num_threads
        self._pipeline = ov_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        """See Engine."""
        tensors = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self._pipeline.generate(tensors, [_config(num_out)] * len(tensors))
        return [list(result.m_generation_ids[0]) for result in results]

    def token_times(self, prompts: list[list[int]], num_out: int) -> list[list[float]]:
        """See Engine."""
        handles = []
        for prompt in prompts:
            tensor = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._num_requests, tensor, _config(num_out)))
            self._num_requests += 1
        times: list[list[float]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, stamps in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        stamps += [now] * len(output.generated_ids)
        return times


def _config(num_out: int) -> ov_genai.GenerationConfig:
    config = ov_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = num_out, True, False
    return config


def main() -> None:
    """Parses the arguments and measures, or works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--precision", default="bf16", help="of the computation (%(default)s)")
    parser.add_argument("--kv-precision", help="of the KV cache; without it openvino's default, u8")
    parser.add_argument("--threads", type=int, help="threads; without it openvino's choice")
    run(lambda args: OpenVINO(args.model, args.precision, args.kv_precision, args.threads), parser.parse_args())


if __name__ == "__main__":
    main()
