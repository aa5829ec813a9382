# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step somebody wants to know the outcome of: of a prompt, only the last one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata

# T = tokens in the step, N = tokens wanted.


@dataclass(frozen=True, slots=True, eq=False)
class WantedTokens:
    """The last tokens of some requests of a step.

    Attributes:
        indices: [N] int64, ascending; where they are among the T.
        metadata: the layout of a step that had these tokens alone.
    """

    indices: Tensor
    metadata: AttentionMetadata
