# SPDX-License-Identifier: Apache-2.0
"""The matrix product."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x @ weight.T + bias."""
    return F.linear(x, weight, bias)
