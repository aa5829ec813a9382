# SPDX-License-Identifier: Apache-2.0
"""Bodies of every kind become a plan within the caps, or an error that names a field; never anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_client import ChatPrompt, Logprob
from wavetrain_gateway.admission import Caller
from wavetrain_gateway.bodies import parse_body
from wavetrain_gateway.errors import GatewayError, InvalidRequest, TooLarge
from wavetrain_gateway.logprobs import chat_logprobs, completion_logprobs
from wavetrain_gateway.plan import Plan, estimate_tokens, plan_chat, plan_completion
from wavetrain_gateway.schemas import ChatRequest, CompletionRequest
from wavetrain_gateway.settings import CapSettings

CAPS = CapSettings()
_NUMBERS = st.one_of(
    st.integers(-3, 30),
    st.sampled_from(
        [2**31, 2**31 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**400, 1e308, -0.0, 0.5, True, False, None]
    ),
    st.floats(allow_nan=True, allow_infinity=True),
)
_VALUES = st.recursive(
    st.one_of(_NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


def fields_of(model: Any) -> Any:
    names = sorted({*model.model_fields, *model.refused, "unknown"})
    return st.dictionaries(st.sampled_from(names), _VALUES, max_size=5)


def check(plan: Plan) -> None:
    assert 1 <= plan.num_choices <= plan.num_generated <= CAPS.max_choices
    assert len(plan.prompts) * plan.num_generated <= CAPS.max_sequences
    assert 1 <= plan.options["max_tokens"] < 2**31
    assert plan.options.get("min_tokens", 0) <= plan.options["max_tokens"]
    assert len(plan.options.get("stop", [])) <= CAPS.max_stop_strings
    assert (plan.num_top or 0) <= CAPS.max_top_logprobs
    for job in plan.jobs(Caller(cache_salt="salt", best_priority=0), 5.0):
        assert (job.generation.priority or 0) >= 0
        assert len(job.generation.cache_salt or "") <= 256
        assert job.num_prompt_tokens >= 1
    assert plan.fingerprint() == plan.fingerprint()


def check_outcome(make: Callable[[], Plan]) -> None:
    refused: GatewayError | None = None
    try:
        plan = make()
    except GatewayError as error:
        refused = error
    else:
        check(plan)
    assert refused is None or (refused.status == 400 and str(refused))


@given(fields_of(CompletionRequest))
@settings(max_examples=300, deadline=None)
def test_any_completion_is_a_plan_or_a_named_error(fields: dict[str, Any]) -> None:
    check_outcome(
        lambda: plan_completion(
            parse_body(json.dumps({"model": "m", "prompt": "x", **fields}), CompletionRequest), CAPS
        )
    )


@given(fields_of(ChatRequest))
@settings(max_examples=300, deadline=None)
def test_any_chat_is_a_plan_or_a_named_error(fields: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    check_outcome(lambda: plan_chat(parse_body(json.dumps(body), ChatRequest), CAPS))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_body_or_an_error(data: bytes) -> None:
    with pytest.raises((InvalidRequest, TooLarge)):
        parse_body(data, CompletionRequest)


@pytest.mark.parametrize(
    ("asked", "best", "own", "expected"),
    [
        (None, None, None, None),
        (-5, None, None, -5),
        (None, -10, 3, 3),
        (-20, -10, 0, -10),
        (7, -10, 0, 7),
        (None, 0, None, 0),
    ],
)
def test_a_request_may_ask_for_a_later_turn_only(asked: Any, best: Any, own: Any, expected: Any) -> None:
    body = {"model": "m", "prompt": "x", "priority": asked}
    plan = plan_completion(parse_body(json.dumps(body), CompletionRequest), CAPS)
    (job,) = plan.jobs(Caller(best_priority=best, priority=own), 1.0)
    assert job.generation.priority == expected


def test_salts_of_callers_and_requests_are_mixed() -> None:
    def salt(caller: str, request: str | None) -> str | None:
        plan = plan_completion(
            parse_body(json.dumps({"model": "m", "prompt": "x", "cache_salt": request}), CompletionRequest), CAPS
        )
        return plan.jobs(Caller(cache_salt=caller), 1.0)[0].generation.cache_salt

    assert salt("", None) is None
    assert salt("", "a") == "a"
    salts = [salt(caller, request) for caller in ("t1", "t2") for request in (None, "a", "b" * 256)]
    assert len(set(salts)) == 6
    assert all(len(item or "") <= 256 for item in salts)


def test_sizes_are_estimated_by_form() -> None:
    assert estimate_tokens([1, 2, 3]) == 3
    assert estimate_tokens("x" * 400) == 100
    assert estimate_tokens(ChatPrompt(messages=[{"role": "user", "content": "x" * 400}])) > 100


def test_logprobs_of_part_of_a_character_have_no_bytes() -> None:
    position = {5: Logprob(-0.5, 1, "\ufffd"), 6: Logprob(-1.0, 2, "é")}
    (entry,) = chat_logprobs([position], 2)["content"]
    assert (entry["bytes"], [item["bytes"] for item in entry["top_logprobs"]]) == (None, [None, [195, 169]])
    shown = completion_logprobs([position, position], 2, 10)
    assert (shown["text_offset"], shown["token_logprobs"]) == ([10, 11], [-0.5, -0.5])


def test_tokens_of_one_text_are_shown_as_the_likeliest_of_them() -> None:
    # lm-eval takes a token at its position's maximum for the model's own choice.
    position = {5: Logprob(-3.0, 7, "\ufffd"), 6: Logprob(-0.5, 1, "\ufffd")}
    shown = completion_logprobs([position], 1, 0)
    assert (shown["token_logprobs"], shown["top_logprobs"]) == ([-3.0], [{"\ufffd": -0.5}])
