# SPDX-License-Identifier: Apache-2.0
"""How often responses may be sent: a budget of processor time.

Where the engine computes on the cores that also send, a response takes its time from the next tokens. So sending has
a share of the cores: after a burst of responses the next one waits until their cost is earned again. The more
requests run, the more a burst costs, the longer the pause and the more tokens are in each response of the next.

The first response of each burst is free. A lone stream therefore never waits, however slow its machine is; what is
rationed is what many streams cost together.
"""

from __future__ import annotations

# Processor time of all who take part, the server's threads and a client on the same machine, over that of the thread
# that sends (measured with server 2.51 and grpc.aio clients: 325 µs of 100).
_WHOLE_COST = 3.3
_FIRST_GUESS_S = 100e-6
# Of an older mean that stays when a burst is counted in: one odd burst must not stop the streams.
_MEMORY = 0.9
# Streams that stutter are worse than a busy core: no pause is longer, whatever a burst cost.
_MAX_PAUSE_S = 0.25


class SendPace:
    """Says when the next burst of responses may go. Knows no clock: moments are arguments. Not thread-safe."""

    def __init__(self, budget_cores: float) -> None:
        """`budget_cores`: cores that sending may keep busy on average; a fraction of one, as a rule."""
        self._budget_cores = budget_cores
        self._response_cost_s = _FIRST_GUESS_S
        self._opens_at_s = float("-inf")

    def charge(self, now_s: float, num_responses: int, cpu_s: float) -> None:
        """Counts a burst that has just been sent, at a cost of `cpu_s` of the sending thread's processor time."""
        if num_responses == 0:
            return
        mean_s = cpu_s / num_responses
        self._response_cost_s += (mean_s - self._response_cost_s) * (1 - _MEMORY)
        pause_s = (num_responses - 1) * self._response_cost_s * _WHOLE_COST / self._budget_cores
        opens_at_s = max(now_s, self._opens_at_s) + pause_s
        self._opens_at_s = min(opens_at_s, now_s + _MAX_PAUSE_S)

    def wait_s(self, now_s: float) -> float:
        """Returns how long the next burst has to wait; 0 where it may go now."""
        return max(0.0, self._opens_at_s - now_s)
