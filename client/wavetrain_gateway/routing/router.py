# SPDX-License-Identifier: Apache-2.0
"""Puts the parts of routing together: a request goes in, a lease on a replica comes out."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from wavetrain_gateway.errors import NotFound, Unavailable
from wavetrain_gateway.routing.balancer import Balancer
from wavetrain_gateway.routing.prefix_index import hash_prefix
from wavetrain_gateway.routing.replica import Lease, Replica
from wavetrain_gateway.routing.replica_set import ReplicaSet
from wavetrain_gateway.routing.retry_budget import RetryBudget
from wavetrain_gateway.routing.routing_table import RoutingTable
from wavetrain_gateway.routing.rules import Rules
from wavetrain_gateway.routing.settings import RoutingSettings
from wavetrain_gateway.upstream import Job


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request may go.

    Attributes:
        models: to be asked in this order, each where those before it have no usable replica.
        hashes: the beginnings of its prompt.
    """

    models: Sequence[str]
    hashes: Sequence[bytes]


class Router:
    """Decides for every request.

    Args:
        replicas: who there is.
        settings: of balance and retries.
        rng: draws targets and replicas.
        clock: monotonic seconds.

    Attributes:
        counts: "retries", "retries_refused" (the budget was used up), "no_replica".
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        settings: RoutingSettings,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas = replicas
        self.settings = settings
        self.clock = clock
        self.rng = rng or random.Random()
        self.counts: Counter[str] = Counter()
        self.budget = RetryBudget(
            ratio=settings.retry.budget_ratio, free_per_s=settings.retry.budget_free_per_s, clock=clock
        )
        self._balancer = Balancer(settings.balance.load_factor, settings.balance.slack_tokens, self.rng)
        self._rules = Rules({}, (), self.rng)
        self._targets: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[str, str]:
        """All names that callers may use, each with the model it stands for, or itself where that depends."""
        return {**self._rules.names, **{model: model for model in sorted(self._models())}}

    def apply(self, table: RoutingTable) -> None:
        """Routes by this table from now on.

        Raises:
            ValueError: it cannot be; nothing was changed then.
        """
        self.replicas.apply(table.replicas)
        self._rules = Rules(table.aliases, table.rules, self.rng)
        targets = {target.model for rule in table.rules for target in rule.targets}
        self._targets = frozenset(targets | set(table.aliases.values()))

    def route(self, job: Job) -> Route:
        """Says where a request may go.

        Raises:
            NotFound: its model is unknown.
        """
        models = self.resolve(job.model, num_prompt_tokens=job.num_prompt_tokens, tier=job.tier)
        has_affinity = self.settings.balance.max_index_chunks > 0
        return Route(models, hash_prefix(job.affinity, job.generation.cache_salt or "") if has_affinity else ())

    def resolve(self, name: str, *, num_prompt_tokens: int = 0, tier: str = "") -> list[str]:
        """The models a name stands for, the one to ask first in front.

        Raises:
            NotFound: the name is unknown.
        """
        models = self._rules.resolve(name, self._models(), num_prompt_tokens=num_prompt_tokens, tier=tier)
        if not models:
            message = f"there is no model {name[:64]!r}; GET /v1/models lists them"
            raise NotFound(message, code="model_not_found", param="model")
        return models

    def lease(self, route: Route, cost_tokens: int, prompt_tokens: int, tried: Collection[Replica]) -> Lease:
        """Chooses a replica, one that was not tried yet where there is one, and counts the request as its own.

        Raises:
            Unavailable: none is usable.
        """
        for candidates in self._candidates(route.models, tried):
            choice = self._balancer.choose(candidates, cost_tokens, route.hashes)
            lease = choice.replica.lease(cost_tokens, prompt_tokens, route.hashes)
            if lease is not None:
                choice.replica.counts.affine += choice.num_matched > 0
                return lease
        self.counts["no_replica"] += 1
        raise Unavailable("no replica of the model takes requests now; send the request again later", code="no_replica")

    def has_untried(self, route: Route, tried: Collection[Replica]) -> bool:
        """Whether there is a usable replica that was not tried yet."""
        return any(replica not in tried for model in route.models for replica in self.replicas.usable(model))

    def _candidates(self, models: Sequence[str], tried: Collection[Replica]) -> list[list[Replica]]:
        usable = [self.replicas.usable(model) for model in models]
        untried = [[replica for replica in group if replica not in tried] for group in usable]
        return [group for group in (*untried, *usable) if group]

    def _models(self) -> set[str]:
        return self.replicas.models | self._targets
