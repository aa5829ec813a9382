# SPDX-License-Identifier: Apache-2.0
"""A forward pass recorded once and run at every step without Python between its kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from wavetrain_kernels.attention_metadata import AttentionMetadata
from wavetrain_kernels.wanted_tokens import WantedTokens

# T = tokens in the step.


class Program(Protocol):
    """A list of calls of `ops` over the tokens of a step. Belongs to one thread at a time."""

    def record(self) -> AbstractContextManager[None]:
        """Within it the calling thread's ops are recorded and not run; their results are where runs will put theirs.

        Every op must have one row for each token of the program's capacity; parameters and caches are kept by address.
        From the first `ops.select_rows` on, runs compute the tokens that they want alone.

        Raises:
            UnsupportedDevice: on leaving, if something was called that cannot be recorded.
        """
        ...

    def run(
        self, token_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, wanted: WantedTokens | None = None
    ) -> None:
        """Runs the calls for the T tokens of a step, T up to the capacity.

        Results are rows [0, T) of the recorded, and [0, N) of those after a selection.

        Args:
            token_ids, positions: [T] int64, contiguous, as the tensors of the metadata are.
            wanted: what selections take; None: all tokens.
        """
        ...
