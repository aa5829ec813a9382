# SPDX-License-Identifier: Apache-2.0
"""Chooses among the replicas of one model that could take a request.

First by prefix affinity, under bounded loads: the replica that has seen most of the prompt's beginning gets it, unless
it has more to do than a constant times its share (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded
Loads, 2016, for the bound; who has seen what comes from `PrefixIndex` in place of a hash ring, as beginnings have no
fixed length). Else by power of two choices: of two replicas drawn at random, the one with fewer outstanding tokens
(Mitzenmacher, 2001). Tokens rather than requests, as a request may cost ten of them or ten thousand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Candidate(Protocol):
    """A replica, as far as the choice needs it."""

    @property
    def outstanding_tokens(self) -> int:
        """Tokens it was asked for and has not worked off."""
        ...

    @property
    def capacity(self) -> float:
        """Its share of the load relative to others: its weight, less while it warms up; above 0."""
        ...

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many chunks of a prompt's beginning it has seen."""
        ...


CandidateT = TypeVar("CandidateT", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Choice(Generic[CandidateT]):
    """A chosen replica.

    Attributes:
        num_matched: chunks of the prompt's beginning for which it was chosen; 0: by load.
    """

    replica: CandidateT
    num_matched: int


@dataclass(frozen=True, slots=True)
class Balancer:
    """Chooses replicas.

    Attributes:
        load_factor: how many times its share of the load a replica may have and still be chosen by affinity.
        slack_tokens: what it may have beyond that, so that affinity works where little is going on.
        rng: draws the two choices.
    """

    load_factor: float
    slack_tokens: int
    rng: random.Random

    def choose(
        self, candidates: Sequence[CandidateT], cost_tokens: int, hashes: Sequence[bytes] = ()
    ) -> Choice[CandidateT]:
        """Chooses one of `candidates`, of which there is at least one, for a request that costs so many tokens."""
        if len(candidates) == 1:
            return Choice(candidates[0], 0)
        if hashes:
            matches = [(replica.match(hashes), replica) for replica in candidates]
            longest = max(count for count, _ in matches)
            fitting = self._not_overloaded([r for count, r in matches if count == longest], candidates)
            if longest and fitting:
                return Choice(self._by_load(fitting, cost_tokens), longest)
        return Choice(self._by_load(candidates, cost_tokens), 0)

    def _not_overloaded(self, preferred: Sequence[CandidateT], candidates: Sequence[CandidateT]) -> list[CandidateT]:
        # Without the request itself: were it larger than the slack, an idle replica would seem overloaded by it.
        total_tokens = sum(replica.outstanding_tokens for replica in candidates)
        per_capacity = self.load_factor * total_tokens / sum(replica.capacity for replica in candidates)
        return [
            replica
            for replica in preferred
            if replica.outstanding_tokens <= per_capacity * replica.capacity + self.slack_tokens
        ]

    def _by_load(self, candidates: Sequence[CandidateT], cost_tokens: int) -> CandidateT:
        drawn = candidates if len(candidates) <= 2 else self.rng.sample(candidates, 2)
        loads = [(replica.outstanding_tokens + cost_tokens) / replica.capacity for replica in drawn]
        least = min(loads)
        return self.rng.choice([replica for replica, load in zip(drawn, loads, strict=True) if load == least])


def warm_up(age_s: float, window_s: float, least: float) -> float:
    """The share of its load that a replica takes which became ready `age_s` seconds ago: from `least` up to 1.

    Linear, as Envoy's slow start by default.
    """
    if window_s <= 0 or age_s >= window_s:
        return 1.0
    return max(least, age_s / window_s)
