# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of the kernels: partial results that a second kernel puts together.

One buffer per (device, name), kept for the life of the process. A captured graph holds addresses, so a buffer that has
become too small is kept too; warm-up asks for the largest first, so that is the exception. Kernels that share a name
must run on one stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class _Buffers:
    """The buffers of a process."""

    def __init__(self) -> None:
        self._current: dict[tuple[torch.device, str], Tensor] = {}
        self._outgrown: list[Tensor] = []

    def get(self, name: str, num_bytes: int, device: torch.device) -> Tensor:
        found = self._current.get((device, name))
        if found is None or found.shape[0] < num_bytes:
            if found is not None:
                self._outgrown.append(found)
            found = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._current[device, name] = found
        return found


_BUFFERS = _Buffers()


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns scratch memory as a contiguous tensor; what it holds is what its last user left there.

    It is zero when it is new: counters that every user brings back to zero stay right. It is the caller's until the
    same name is asked for again. Aligned as torch allocates.
    """
    num_bytes = max(math.prod(shape), 1) * dtype.itemsize
    buffer = _BUFFERS.get(name, num_bytes, device)
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)
