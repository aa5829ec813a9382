# SPDX-License-Identifier: Apache-2.0
"""An engine core process without torch: the real socket, scheduler and loop over the fake executor.

Run as a script by CoreClient in the tests of IPC. What it does at load is the `model` of its engine.toml:
`echo` works, `slow` does so after a while, `broken` is a bad checkpoint, `crash` dies.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.executor import FakeExecutor
from wavetrain_engine import core_process
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.core_process import Progress
from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.facts import EngineFacts
from wavetrain_engine.generation_config import GenerationConfig
from wavetrain_engine.plan import PendingResult, StepPlan

COMMAND = (sys.executable, __file__)
VOCAB_SIZE = 1000
MAX_MODEL_LEN = 4096
_STEP_S = 0.002
_SLOW_LOAD_S = 2.0


class SlowExecutor(FakeExecutor):
    """Takes its time, so that a test can catch a request while it runs."""

    def submit(self, plan: StepPlan) -> PendingResult:
        time.sleep(_STEP_S)
        return super().submit(plan)


def load(config: EngineConfig, progress: Progress) -> tuple[SlowExecutor, EngineFacts]:
    kind = Path(config.model.model).name
    progress("weights", 0, 2)
    if kind == "broken":
        raise CheckpointError("the checkpoint has no weights")
    if kind == "crash":
        os._exit(3)
    if kind == "slow":
        time.sleep(_SLOW_LOAD_S)
    progress("weights", 2, 2)
    facts = EngineFacts(
        architecture="Fake",
        dtype="float32",
        device="none",
        cpu_threads=1,
        kernels="none",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        block_size=16,
        num_blocks=1024,
        kv_cache_dtype="float32",
        kv_cache_bytes=0,
        weight_bytes=0,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        generation=GenerationConfig(),
        load_s=0.0,
        version="0",
    )
    executor = SlowExecutor(
        num_blocks=1024,
        block_size=16,
        vocab_size=VOCAB_SIZE,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
    )
    executor.is_checking_reads = False
    return executor, facts


if __name__ == "__main__":
    sys.exit(core_process.main(load=load))
