# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a matrix's inputs: not the inputs, which would not fit, but their second moments and sizes.

The squared error of an output, over all inputs x that were seen, follows from the moments alone:

    sum over x of ((W' - W) x)^2 = (W' - W) M (W' - W)^T,   M = sum over x of x x^T

so every method can judge a rounded weight W' exactly, and memory does not grow with the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

# T = tokens, K = inputs, N = outputs.


class InputMoments:
    """Sums over the inputs [T, K] of a matrix.

    Attributes:
        count: tokens that were seen.
        second: [K, K] float32, the sum of x x^T.
        largest: [K] float32, the largest |x|.
    """

    def __init__(self, in_features: int) -> None:
        self.count = 0
        self.second = torch.zeros(in_features, in_features)
        self.largest = torch.zeros(in_features)

    def add(self, x: Tensor) -> None:
        """Takes inputs [T, K] of any floating dtype into account."""
        if x.shape[0] == 0:
            return
        wide = x.float()
        self.count += x.shape[0]
        self.second.addmm_(wide.t(), wide)
        torch.maximum(self.largest, wide.abs().amax(0), out=self.largest)

    def rescale(self, factors: Tensor) -> None:
        """Turns the sums into those of inputs that are multiplied by factors [K] > 0."""
        self.second.mul_(factors[:, None]).mul_(factors[None, :])
        self.largest.mul_(factors)

    def loss(self, errors: Tensor) -> Tensor:
        """Returns the summed squared error of each output [N] that errors [N, K] of a weight make."""
        return ((errors @ self.second) * errors).sum(1)
