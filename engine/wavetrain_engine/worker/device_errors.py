# SPDX-License-Identifier: Apache-2.0
"""What callers hear when a GPU fails under a step."""

from __future__ import annotations

import torch

from wavetrain_engine.errors import EngineDead


def step_error(error: Exception, step_id: int) -> Exception:
    """Returns what a step that raised `error` has to raise: EngineDead where the device is the cause.

    A kernel's failure shows with whatever call comes next, maybe in a later step, and no call works after it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return EngineDead(
            "the GPU has no memory left for a step; serve with a lower --gpu-memory-utilization or "
            "--max-num-batched-tokens"
        )
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error) or "[CUDA]" in str(error):  # Triton's
        cause = str(error).partition("\n")[0]
        return EngineDead(f"the GPU failed in step {step_id} or before it ({cause}); the engine has to start anew")
    return error
