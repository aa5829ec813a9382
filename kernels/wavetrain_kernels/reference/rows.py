# SPDX-License-Identifier: Apache-2.0
"""Taking some rows out of many."""

from __future__ import annotations

import torch
from torch import Tensor


def select_rows(out: Tensor, x: Tensor, indices: Tensor) -> None:
    """out [N, ...] = rows of x [T, ...]."""
    torch.index_select(x, 0, indices, out=out)
