# SPDX-License-Identifier: Apache-2.0
"""From the name a caller uses to the models that may answer, best first."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from wavetrain_gateway.routing.routing_table import Rule, Target


class Rules:
    """Aliases and rules, as they are now.

    Args:
        aliases: other names of models.
        rules: in order.
        rng: draws targets by weight.
    """

    def __init__(self, aliases: Mapping[str, str], rules: Sequence[Rule], rng: random.Random) -> None:
        self._aliases = aliases
        self._rules = rules
        self._rng = rng

    @property
    def names(self) -> dict[str, str]:
        """All names but models' own, each with the model it stands for, or with itself where that depends."""
        names = dict(self._aliases)
        for rule in self._rules:
            models = {target.model for other in self._rules if other.name == rule.name for target in other.targets}
            names[rule.name] = next(iter(models)) if len(models) == 1 else rule.name
        return names

    def resolve(self, name: str, models: Collection[str], *, num_prompt_tokens: int = 0, tier: str = "") -> list[str]:
        """The models a request may go to, the one to ask first in front; empty where the name is unknown.

        Args:
            name: what the caller named.
            models: those that have replicas, or had them.
            num_prompt_tokens: of the request.
            tier: the caller's.
        """
        for rule in self._rules:
            if rule.name == name and rule.fits(num_prompt_tokens, tier):
                return self._in_drawn_order(rule.targets)
        model = self._aliases.get(name, name)
        return [model] if model in models else []

    def _in_drawn_order(self, targets: Sequence[Target]) -> list[str]:
        """One target drawn by weight; behind it the others, which step in where it has no replica."""
        first = self._rng.choices(targets, [target.weight for target in targets])[0]
        rest = sorted((target for target in targets if target is not first), key=lambda target: -target.weight)
        return list(dict.fromkeys(target.model for target in (first, *rest)))
