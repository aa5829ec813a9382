# SPDX-License-Identifier: Apache-2.0
"""The routing file, and from a name to the models that may answer."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from wavetrain_gateway.routing.routing_table import RoutingTable, parse_routing
from wavetrain_gateway.routing.rules import Rules
from wavetrain_gateway.toml_file import FileError

TABLE = b"""
[alias]
"gpt-4o-mini" = "small"

[[replica]]
url = "10.0.0.1:8001"
model = "small"

[[replica]]
name = "big-one"
url = "grpcs://[2001:db8::1]:8001"
model = "large"
weight = 2.5
triton_model = "ensemble"

[[rule]]
name = "auto"
tiers = ["premium"]
targets = [{ model = "large" }]

[[rule]]
name = "auto"
max_prompt_tokens = 100
targets = [{ model = "small" }]

[[rule]]
name = "auto"
targets = [{ model = "large" }]

[[rule]]
name = "canary"
targets = [{ model = "small", weight = 9 }, { model = "large", weight = 1 }]

[[rule]]
name = "small"
min_prompt_tokens = 4000
targets = [{ model = "large" }]
"""
MODELS = {"small", "large"}


def rules(seed: int = 0) -> Rules:
    table = parse_routing(TABLE, "routing.toml")
    return Rules(table.aliases, table.rules, random.Random(seed))


def test_replicas_are_named_after_their_address_where_they_have_no_name() -> None:
    table = parse_routing(TABLE, "routing.toml")
    assert [(replica.name, replica.weight, replica.triton_model) for replica in table.replicas] == [
        ("10.0.0.1:8001", 1.0, "llm"),
        ("big-one", 2.5, "ensemble"),
    ]


@pytest.mark.parametrize(
    ("name", "num_prompt_tokens", "tier", "models"),
    [
        ("small", 10, "default", ["small"]),
        ("small", 4000, "default", ["large"]),
        ("large", 10, "default", ["large"]),
        ("gpt-4o-mini", 10**6, "default", ["small"]),
        ("auto", 100, "default", ["small"]),
        ("auto", 101, "default", ["large"]),
        ("auto", 1, "premium", ["large"]),
        ("other", 1, "default", []),
    ],
)
def test_names_lead_to_models(name: str, num_prompt_tokens: int, tier: str, models: list[str]) -> None:
    assert rules().resolve(name, MODELS, num_prompt_tokens=num_prompt_tokens, tier=tier) == models


def test_a_canary_gets_its_share_and_the_other_steps_in_for_it() -> None:
    drawn = rules()
    orders = Counter(tuple(drawn.resolve("canary", MODELS)) for _ in range(2000))
    assert set(orders) == {("small", "large"), ("large", "small")}
    assert 140 <= orders["large", "small"] <= 260


def test_a_target_without_weight_only_steps_in() -> None:
    table = RoutingTable.model_validate(
        {
            "replica": [{"url": "h:1", "model": "a"}, {"url": "h:2", "model": "b"}],
            "rule": [{"name": "x", "targets": [{"model": "b", "weight": 0}, {"model": "a"}]}],
        }
    )
    some = Rules(table.aliases, table.rules, random.Random(0))
    assert {tuple(some.resolve("x", {"a", "b"})) for _ in range(100)} == {("a", "b")}


def test_all_names_are_listed_with_what_they_stand_for() -> None:
    assert rules().names == {"gpt-4o-mini": "small", "auto": "auto", "canary": "canary", "small": "large"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[replica]]\nurl='h:1'", "replica[0].model: Field required"),
        ("[[replica]]\nurl='http://h:1'\nmodel='m'", "replica[0].url: 'http://h:1' is an HTTP address"),
        ("[[replica]]\nurl='h'\nmodel='m'", "replica[0].url: 'h' is no server address"),
        ("[[replica]]\nurl='h:1'\nmodel='m'\nwieght=1", "did you mean 'weight'?"),
        ("[[replica]]\nurl='h:1'\nmodel='m'\nweight=0", "replica[0].weight: Input should be greater than 0"),
        ("[[replica]]\nurl='h:1'\nmodel='m'\n" * 2, "two replicas have the name 'h:1'"),
        ("[alias]\na='b'", "alias 'a': no replica serves 'b'; models with replicas are: none"),
        ("[alias]\nm='m'\n[[replica]]\nurl='h:1'\nmodel='m'", "alias 'm': a model or a rule has that name"),
        (
            "[[replica]]\nurl='h:1'\nmodel='m'\n[[rule]]\nname='x'\ntargets=[{model='n'}]",
            "rule for 'x': no replica serves 'n'; models with replicas are: m",
        ),
        (
            "[[replica]]\nurl='h:1'\nmodel='m'\n[[rule]]\nname='x'\ntiers=['a']\ntargets=[{model='m'}]",
            "rule for 'x': requests that no rule of this name fits would go nowhere",
        ),
        (
            "[[replica]]\nurl='h:1'\nmodel='m'\n[[rule]]\nname='m'\ntargets=[{model='m', weight=0}]",
            "rule[0]: all weights of the targets are 0",
        ),
        (
            "[[rule]]\nname='m'\nmin_prompt_tokens=5\nmax_prompt_tokens=4\ntargets=[{model='m'}]",
            "the rule fits nothing",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(FileError) as caught:
        parse_routing(text.encode(), "routing.toml")
    assert message in str(caught.value)
