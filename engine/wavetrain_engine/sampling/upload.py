# SPDX-License-Identifier: Apache-2.0
"""Small host arrays to the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Returns the array as a tensor on the device; on the CPU it is the array's own memory.

    A copy from pageable memory would wait for the kernels that are queued already, so it goes by pinned memory, which
    torch keeps for us until the copy is done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_ints(values: list[int], device: torch.device) -> Tensor:
    """Returns the values as int64 on the device."""
    return upload(np.asarray(values, dtype=np.int64), device)
