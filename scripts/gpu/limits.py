# SPDX-License-Identifier: Apache-2.0
"""What the device can do at most, measured in the same run as everything that is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu.rounds import Spread, take_turns
from gpu.timing import Timer

# Large enough to fill the device, small enough to be over soon.
_COPY_BYTES = 2 * 10**9
_MATMUL_SIZE = 8192
_DRY_BYTES = 10**4
_DRY_MATMUL_SIZE = 32


@dataclass(frozen=True)
class Limits:
    """Ceilings: bytes/s of a copy (read and written counted), of a plain read (a sum), FLOP/s of a matrix product."""

    copy: Spread
    read: Spread
    matmul: Spread

    def seconds(self, num_bytes: float, num_flops: float) -> tuple[float, str]:
        """Returns the least time that moving and computing so much can take, and which of both it is.

        The bytes are set against the copy, which a device does slightly slower than a read: bars are given so.
        """
        move, compute = num_bytes / self.copy.median, num_flops / self.matmul.median
        return (move, "copy bandwidth") if move >= compute else (compute, "matrix product")

    def as_json(self) -> dict[str, object]:
        """Returns GB/s and TFLOP/s."""
        return {
            "copy_gb_s": _scaled(self.copy, 1e9),
            "read_gb_s": _scaled(self.read, 1e9),
            "matmul_tflop_s": _scaled(self.matmul, 1e12),
        }


def measure_limits(timer: Timer, dtype: torch.dtype, num_rounds: int, *, is_dry_run: bool) -> Limits:
    """Measures the three in turns, on random data: zeros are multiplied faster than anything else."""
    device = timer.device
    num_elements = (_DRY_BYTES if is_dry_run else _COPY_BYTES) // dtype.itemsize
    source = torch.randn(num_elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    words = source.view(torch.int32)
    size = _DRY_MATMUL_SIZE if is_dry_run else _MATMUL_SIZE
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    seconds = take_turns(
        {
            "copy": timer.make([lambda: target.copy_(source)]),
            "read": timer.make([lambda: words.amax()]),
            "matmul": timer.make([lambda: torch.mm(left, right, out=product)]),
        },
        num_rounds,
    )
    work = {"copy": 2 * source.nbytes, "read": source.nbytes, "matmul": 2 * size**3}
    return Limits(**{name: Spread.of(work[name] / second for second in seconds[name]) for name in work})


def _scaled(spread: Spread, unit: float) -> dict[str, float]:
    return Spread(spread.median / unit, spread.low / unit, spread.high / unit).as_json()
