# SPDX-License-Identifier: Apache-2.0
"""Looking up rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding(out: Tensor, table: Tensor, token_ids: Tensor, scale: float, _is_packed: bool) -> None:
    """out [T, H] = rows of the table times scale. A packed table is the table."""
    torch.index_select(table, 0, token_ids, out=out)
    if scale != 1.0:
        out *= scale
