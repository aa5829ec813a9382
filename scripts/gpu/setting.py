# SPDX-License-Identifier: Apache-2.0
"""Where kernels are measured or checked: the GPU in bfloat16, or in a dry run the interpreter in float16 on the CPU."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu.timing import GraphTimer, HostTimer, Timer
from wavetrain_kernels.gpu.kernels import GPU
from wavetrain_kernels.ops import choose_kernels, dispatch


@dataclass(frozen=True)
class Setting:
    """The device, what is computed in, and who takes the time; our kernels answer there."""

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    is_dry_run: bool

    @classmethod
    def make(cls, *, is_dry_run: bool) -> Setting:
        """Lets our GPU kernels answer for the device.

        Raises:
            SystemExit: there is no GPU, and this is no dry run.
        """
        torch.manual_seed(0)
        if is_dry_run:
            device = torch.device("cpu")
            dispatch._CHOSEN["cpu"] = GPU  # never so outside of a dry run: interpreted kernels serve nobody
            return cls(device, torch.float16, HostTimer(device), is_dry_run=True)
        if not torch.cuda.is_available():
            raise SystemExit("no NVIDIA GPU: torch sees none here. --dry-run executes everything but the timing")
        device = torch.device("cuda", torch.cuda.current_device())
        choose_kernels("gpu", device, Path(tempfile.gettempdir()) / "wavetrain-kernels")
        # Matrix products in float32 are the truth here, so they must be that.
        torch.backends.cuda.matmul.allow_tf32 = False
        return cls(device, torch.bfloat16, GraphTimer(device), is_dry_run=False)

    def forget(self) -> None:
        """Gives the memory of the last comparison back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
