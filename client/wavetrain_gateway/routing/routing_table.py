# SPDX-License-Identifier: Apache-2.0
"""What the routing file says: replicas, aliases and rules."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wavetrain_client.channel import Address
from wavetrain_gateway.toml_file import parse_file

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]
Weight = Annotated[float, Field(gt=0, le=1e6)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaEntry(_Table):
    """One server of one model: `[[replica]]`.

    Attributes:
        url: the Triton server's gRPC address.
        model: the public name of what it serves.
        name: for metrics, logs and the admin API; the address where none is given.
        triton_model: the model's name on the server.
        weight: its share of the load relative to the model's other replicas.
    """

    url: str
    model: Name
    name: Name = ""
    triton_model: Name = "llm"
    weight: Weight = 1.0

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        Address.parse(url)
        return url

    @model_validator(mode="after")
    def _name_it(self) -> ReplicaEntry:
        if not self.name:
            object.__setattr__(self, "name", Address.parse(self.url).target.replace("[", "").replace("]", ""))
        return self

    def is_same_server(self, other: ReplicaEntry) -> bool:
        """Whether both stand for the same model on the same server, whatever their weights."""
        return (self.name, self.url, self.model, self.triton_model) == (
            other.name,
            other.url,
            other.model,
            other.triton_model,
        )


class Target(_Table):
    """A model that a rule sends requests to.

    Attributes:
        weight: its share of the rule's requests; 0 for one that only steps in when the others have no replica.
    """

    model: Name
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0


class Rule(_Table):
    """Sends requests that name `name` to models: `[[rule]]`. The first rule of the name that fits decides.

    Attributes:
        targets: one of them is drawn by weight for each request.
        min_prompt_tokens: it fits from so many tokens on, by an estimate where the prompt is text.
        max_prompt_tokens: it fits up to so many.
        tiers: it fits callers of these tiers; None: all.
    """

    name: Name
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    min_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    max_prompt_tokens: Annotated[int, Field(ge=0)] | None = None
    tiers: Annotated[frozenset[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < self.min_prompt_tokens:
            raise ValueError("max_prompt_tokens is less than min_prompt_tokens, so the rule fits nothing")
        if not any(target.weight for target in self.targets):
            raise ValueError("all weights of the targets are 0; give at least one of them a share")
        return self

    def fits(self, num_prompt_tokens: int, tier: str) -> bool:
        """Whether the rule is for such a request."""
        is_short = self.max_prompt_tokens is None or num_prompt_tokens <= self.max_prompt_tokens
        return num_prompt_tokens >= self.min_prompt_tokens and is_short and (self.tiers is None or tier in self.tiers)

    @property
    def is_unconditional(self) -> bool:
        """Whether it fits every request."""
        return self.min_prompt_tokens == 0 and self.max_prompt_tokens is None and self.tiers is None


class RoutingTable(_Table):
    """A whole routing file.

    Attributes:
        replicas: `[[replica]]` tables.
        aliases: `[alias]`: other names of models.
        rules: `[[rule]]` tables, in order.
    """

    replicas: Annotated[tuple[ReplicaEntry, ...], Field(alias="replica")] = ()
    aliases: Annotated[dict[Name, Name], Field(alias="alias")] = {}
    rules: Annotated[tuple[Rule, ...], Field(alias="rule")] = ()

    @model_validator(mode="after")
    def _check(self) -> RoutingTable:
        names = [replica.name for replica in self.replicas]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two replicas have the name {twice[0]!r}; give each its own")
        models = {replica.model for replica in self.replicas}
        wanted = [(f"alias {alias!r}", model) for alias, model in self.aliases.items()]
        wanted += [(f"rule for {rule.name!r}", target.model) for rule in self.rules for target in rule.targets]
        for who, model in wanted:
            if model not in models:
                known = ", ".join(sorted(models)) or "none"
                raise ValueError(f"{who}: no replica serves {model!r}; models with replicas are: {known}")
        taken = {rule.name for rule in self.rules} | models
        if doubled := sorted(taken & self.aliases.keys()):
            raise ValueError(f"alias {doubled[0]!r}: a model or a rule has that name; choose another")
        for name in {rule.name for rule in self.rules} - models:
            if not any(rule.is_unconditional for rule in self.rules if rule.name == name):
                raise ValueError(
                    f"rule for {name!r}: requests that no rule of this name fits would go nowhere; add a last rule "
                    "without conditions, or a model of this name"
                )
        return self


def parse_routing(data: bytes, name: str) -> RoutingTable:
    """Reads a routing file, JSON where its name ends in `.json`, else TOML.

    Raises:
        FileError: it is none.
    """
    return parse_file(data, name, RoutingTable)
