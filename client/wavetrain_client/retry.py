# SPDX-License-Identifier: Apache-2.0
"""When a failed attempt may be repeated, and after how long: a pure function of the error and the attempt's number."""

from __future__ import annotations

import random
from dataclasses import dataclass

from wavetrain_client.errors import ClientError, ConnectionFailed, ServerBusy

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Repeats a request that the server cannot have begun to answer.

    Only ServerBusy and ConnectionFailed are repeated: both say that nothing was generated. The delay doubles from one
    retry to the next and is jittered, so that the clients a full server refused together do not come back together.

    Attributes:
        max_retries: attempts after the first; 0 turns retries off.
    """

    max_retries: int = 2

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {self.max_retries}")

    def delay_s(self, error: ClientError, num_failed: int) -> float | None:
        """Returns how long to wait before the next attempt, or None for no further attempt.

        Args:
            error: what ended the last attempt.
            num_failed: attempts that failed so far, the last one included.
        """
        if num_failed > self.max_retries or not isinstance(error, (ServerBusy, ConnectionFailed)):
            return None
        longest = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (num_failed - 1))
        return longest * random.uniform(0.5, 1.0)
