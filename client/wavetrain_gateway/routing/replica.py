# SPDX-License-Identifier: Apache-2.0
"""One server of one model: what it has to do, how it is, and whether it may be asked.

Invariants:
    1. `outstanding_tokens` is the sum of what the leases in flight have left; none in flight: 0
    2. only a replica that is healthy, not draining, not ejected, and whose breaker allows it, is usable
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from wavetrain_gateway.routing.balancer import warm_up
from wavetrain_gateway.routing.circuit_breaker import CircuitBreaker
from wavetrain_gateway.routing.prefix_index import PrefixIndex
from wavetrain_gateway.routing.replica_client import ReplicaClient
from wavetrain_gateway.routing.routing_table import ReplicaEntry
from wavetrain_gateway.routing.settings import RoutingSettings

Health = Literal["starting", "healthy", "unhealthy"]
Origin = Literal["file", "admin"]


@dataclass(slots=True)
class ReplicaCounts:
    """What happened to a replica since it was added.

    Attributes:
        requests: sent to it, retries included.
        failures: of those, that failed for a reason which is the replica's.
        affine: of those, sent to it because it has seen the prompt's beginning.
    """

    requests: int = 0
    failures: int = 0
    affine: int = 0


class Replica:
    """A replica.

    Args:
        entry: what the routing file or the admin API says of it.
        client: the connection.
        origin: who added it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        entry: ReplicaEntry,
        client: ReplicaClient,
        settings: RoutingSettings,
        *,
        origin: Origin = "file",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.entry = entry
        self.client = client
        self.origin: Origin = origin
        self.counts = ReplicaCounts()
        self.max_model_len: int | None = None
        self.is_draining = False
        self.was_probed = False
        self.last_answer_s: float | None = None
        self.breaker = CircuitBreaker(
            num_failures=settings.breaker.num_failures,
            first_open_s=settings.breaker.first_open_s,
            max_open_s=settings.breaker.max_open_s,
            clock=clock,
        )
        self._balance = settings.balance
        self._index = PrefixIndex(settings.balance.max_index_chunks)
        self._clock = clock
        self._health: Health = "starting"
        self._healthy_since_s = 0.0
        self._num_running = 0
        self._outstanding_tokens = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def name(self) -> str:
        """What metrics, logs and the admin API call it."""
        return self.entry.name

    @property
    def health(self) -> Health:
        """Starting: never ready yet; unhealthy: not ready any more."""
        return self._health

    @property
    def num_running(self) -> int:
        """Requests in flight."""
        return self._num_running

    @property
    def outstanding_tokens(self) -> int:
        """Tokens it was asked for and has not worked off."""
        return self._outstanding_tokens

    @property
    def capacity(self) -> float:
        """Its weight, less while it warms up."""
        age_s = self._clock() - self._healthy_since_s
        return self.entry.weight * warm_up(age_s, self._balance.warm_up_s, self._balance.warm_up_least)

    @property
    def is_usable(self) -> bool:
        """Whether a request may be sent to it now; ejection is the detector's to say."""
        return self._health == "healthy" and not self.is_draining and self.breaker.allows()

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many chunks of a prompt's beginning it has seen."""
        return self._index.match(hashes)

    def mark_healthy(self) -> None:
        """It is ready, and generates. One that was not begins slowly, and with an empty prefix cache."""
        if self._health == "healthy":
            return
        self._health = "healthy"
        self._healthy_since_s = self._clock()
        self.breaker.succeed()
        self._index.clear()

    def mark_unhealthy(self) -> None:
        """It is not ready, or does not generate."""
        if self._health != "starting":
            self._health = "unhealthy"

    def lease(self, cost_tokens: int, prompt_tokens: int, hashes: Sequence[bytes]) -> Lease | None:
        """Counts a request as sent to it; None where its breaker has opened in the meantime."""
        if not self.breaker.acquire():
            return None
        self._num_running += 1
        self._outstanding_tokens += cost_tokens
        self._is_idle.clear()
        self.counts.requests += 1
        if self._balance.max_index_chunks:
            self._index.add(hashes)
        return Lease(self, cost_tokens, prompt_tokens)

    def note_answer(self) -> None:
        """It answered somebody: as good as a canary."""
        self.last_answer_s = self._clock()

    async def wait_idle(self) -> None:
        """Waits until no request is in flight."""
        await self._is_idle.wait()

    def work_off(self, num_tokens: int) -> None:
        """Counts tokens as done; for leases."""
        self._outstanding_tokens -= num_tokens

    def end_request(self) -> None:
        """Counts a request as ended; for leases."""
        self._num_running -= 1
        if self._num_running == 0:
            self._is_idle.set()


class Lease:
    """A request in flight on a replica. Has to be ended, once; more does no harm."""

    def __init__(self, replica: Replica, cost_tokens: int, prompt_tokens: int) -> None:
        self.replica = replica
        self._left_tokens = cost_tokens
        self._prompt_tokens = min(prompt_tokens, cost_tokens)
        self._has_answered = False
        self._is_ended = False

    def note_chunk(self, num_output_tokens: int) -> None:
        """A chunk came: with the first the prompt is worked off, and the replica is known to live."""
        done = num_output_tokens
        if not self._has_answered:
            self._has_answered = True
            done += self._prompt_tokens
            self.replica.breaker.succeed()
        self.replica.note_answer()
        done = min(done, self._left_tokens)
        self._left_tokens -= done
        self.replica.work_off(done)

    def end(self, *, has_failed: bool = False) -> None:
        """The request is over; `has_failed`: for a reason that is the replica's."""
        if self._is_ended:
            return
        self._is_ended = True
        if has_failed:
            self.replica.counts.failures += 1
            self.replica.breaker.fail()
        elif not self._has_answered:
            self.replica.breaker.abandon()
        self.replica.work_off(self._left_tokens)
        self._left_tokens = 0
        self.replica.end_request()
