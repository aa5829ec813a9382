# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters: every range and type, from Python and from untrusted JSON."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavetrain_engine.errors import InvalidSamplingParams
from wavetrain_engine.sampling_params import SamplingParams, parse_json_object

NAN, INF = float("nan"), float("inf")
NAMES = SamplingParams.__struct_fields__
# name: (lowest and highest that are fine, the nearest that are not)
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 128], [0, -1, 129]),
    "temperature": ([0, 0.0, 1e-9, 1e6], [-1e-9, -1, 1e7]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31]),
    "top_p": ([1e-9, 1, 1.0], [0, -1, 2, 1.0001]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1]),
    "repetition_penalty": ([1e-9, 1, 1000], [0, -1, 1001]),
    "presence_penalty": ([-1000, 0, 1000], [-1001, 1001]),
    "frequency_penalty": ([-1000, 0, 1000], [-1001, 1001]),
    "seed": ([-(2**63), 0, 2**64 - 1], [-(2**63) - 1, 2**64]),
    "max_tokens": ([1, 2**31 - 1], [0, -1, 2**31]),
    "min_tokens": ([0, 16], [-1, 2**31]),
    "logprobs": ([0, 100], [-1, 101]),
    "prompt_logprobs": ([0, 100], [-1, 101]),
}
FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
INTS = sorted(set(RANGES) - set(FLOATS))
BOOLS = ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"]
LISTS = ["stop", "stop_token_ids", "bad_words", "bad_words_token_ids"]


def from_json(text: str | bytes, defaults: SamplingParams | None = None) -> SamplingParams:
    return SamplingParams.from_mapping(parse_json_object(text), defaults)


def both(values: dict[str, Any]) -> list[Any]:
    """The two doors: keyword arguments from Python, a mapping from JSON."""
    return [lambda: SamplingParams(**values), lambda: SamplingParams.from_mapping(values)]


def refuse(values: dict[str, Any], message: str) -> None:
    for make in both(values):
        with pytest.raises(InvalidSamplingParams, match=message):
            make()


class TestRanges:
    def test_every_number_is_tried(self) -> None:
        assert set(RANGES) | set(BOOLS) | set(LISTS) | {"logit_bias"} == set(NAMES)

    @pytest.mark.parametrize("name", RANGES)
    def test_numbers(self, name: str) -> None:
        good, bad = RANGES[name]
        for value in good:
            for make in both({name: value}):
                assert getattr(make(), name) == value
        for value in bad:
            refuse({name: value}, rf"^{name} must be ")

    @pytest.mark.parametrize("name", FLOATS)
    def test_numbers_are_finite(self, name: str) -> None:
        for value in (NAN, INF, -INF, 10**400, 10**5000):
            refuse({name: value}, rf"^{name} must be a finite number, got ")

    @pytest.mark.parametrize("name", INTS)
    def test_integers_are_whole_and_of_bounded_size(self, name: str) -> None:
        for value in (10**5000, -(10**5000), 10**400):
            refuse({name: value}, rf"^{name} must be between ")
        for value in (0.5, NAN, INF, [1], {}):
            refuse({name: value}, rf"^{name} must be an integer")

    @pytest.mark.parametrize("name", RANGES)
    def test_a_boolean_is_no_number(self, name: str) -> None:
        refuse({name: True}, rf"^{name} must be ")

    @pytest.mark.parametrize("name", BOOLS)
    def test_a_number_is_no_boolean(self, name: str) -> None:
        for value in (0, 1, 1.0, "yes", "", None, []):
            refuse({name: value}, rf"^{name} must be true or false")
        for value in (True, False):
            for make in both({name: value}):
                assert getattr(make(), name) is value

    def test_min_tokens_fit_into_max_tokens(self) -> None:
        refuse({"min_tokens": 17}, r"min_tokens \(17\) is more than max_tokens \(16\)")
        assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17

    def test_greedy(self) -> None:
        assert SamplingParams(temperature=0).is_greedy
        assert SamplingParams(top_k=1).is_greedy
        assert not SamplingParams().is_greedy


class TestLists:
    @pytest.mark.parametrize("name", LISTS)
    def test_none_is_empty(self, name: str) -> None:
        for make in both({name: None}):
            assert getattr(make(), name) == []

    @pytest.mark.parametrize("name", LISTS)
    def test_ten_thousand_are_too_many(self, name: str) -> None:
        item: Any = {"stop": "x", "bad_words": "x", "stop_token_ids": 1, "bad_words_token_ids": [1]}[name]
        refuse({name: [item] * 10_000}, rf"^{name} has 10000 entries; at most \d+ are allowed")

    def test_one_stop_string_is_a_list_of_one(self) -> None:
        for make in both({"stop": "END"}):
            assert make().stop == ["END"]

    @pytest.mark.parametrize("name", ["stop", "bad_words"])
    def test_strings(self, name: str) -> None:
        refuse({name: [""]}, rf"^{name} must hold non-empty strings")
        refuse({name: ["ok", 1]}, rf"^{name} must ")
        refuse({name: {"a": 1}}, rf"^{name} must be a list")
        refuse({name: ["x" * 1025]}, rf"^{name} has a string of 1025 characters")
        SamplingParams(**{name: ["x" * 1024]})  # type: ignore[arg-type]

    def test_token_ids(self) -> None:
        for bad in (-1, 2**31, 10**5000):
            refuse({"stop_token_ids": [bad]}, "^stop_token_ids must be between 0 and 2147483647")
            refuse({"bad_words_token_ids": [[1, bad]]}, "^bad_words_token_ids must be between 0")
        for bad in (True, 1.5, None, [1]):
            refuse({"stop_token_ids": [bad]}, "^stop_token_ids must be an integer")
        refuse({"stop_token_ids": "12"}, "^stop_token_ids must be a list")
        refuse({"bad_words_token_ids": [1]}, "^bad_words_token_ids must be .*lists of token ids")
        refuse({"bad_words_token_ids": [[1] * 1025]}, "^bad_words_token_ids has a sequence of 1025 tokens")

    def test_logit_bias(self) -> None:
        for make in both({"logit_bias": {5: 1, 6: -1e6}}):
            assert make().logit_bias == {5: 1.0, 6: -1e6}
        refuse({"logit_bias": [5, 1.0]}, "^logit_bias must be an object of token id to number")
        refuse({"logit_bias": {-1: 1.0}}, "^logit_bias's token id must be between 0")
        refuse({"logit_bias": {1: NAN}}, r"^logit_bias\[1\] must be a finite number")
        refuse({"logit_bias": {1: 1e7}}, r"^logit_bias\[1\] must be at least -1e\+06 and at most 1e\+06")
        refuse({"logit_bias": {1: True}}, "^logit_bias.* must be a number")
        refuse({"logit_bias": dict.fromkeys(range(65537), 0.0)}, "^logit_bias has 65537 entries")


class TestFromJson:
    def test_numbers_and_booleans_may_be_strings(self) -> None:
        text = """{"temperature": "0.5", "max_tokens": " 7 ", "top_k": "-1", "seed": "18446744073709551615",
                   "ignore_eos": "True", "stop_token_ids": ["3"], "logit_bias": {"5": "-1.5"}, "top_p": "1"}"""
        params = from_json(text)
        assert params == SamplingParams(
            temperature=0.5,
            max_tokens=7,
            top_k=-1,
            seed=2**64 - 1,
            ignore_eos=True,
            stop_token_ids=[3],
            logit_bias={5: -1.5},
            top_p=1.0,
        )

    def test_a_whole_float_is_an_integer(self) -> None:
        params = from_json('{"max_tokens": 16.0, "top_k": 4e1}')
        assert (params.max_tokens, params.top_k, type(params.max_tokens)) == (16, 40, int)

    def test_null_means_not_set(self) -> None:
        params = from_json(
            '{"seed": null, "max_tokens": null, "logprobs": null, "stop": null, "logit_bias": null}',
            SamplingParams(seed=3, stop=["x"], logit_bias={1: 1.0}),
        )
        assert params == SamplingParams(max_tokens=None)
        with pytest.raises(InvalidSamplingParams, match="temperature must be a number, got 'None'"):
            from_json('{"temperature": null}')

    def test_defaults_hold_where_it_is_silent(self) -> None:
        defaults = SamplingParams(temperature=0.6, top_k=20)
        assert from_json("{}", defaults) == defaults
        assert from_json(b'{"top_k": 0}', defaults) == SamplingParams(temperature=0.6)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"temprature": 1}', "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
            ('{"": 1}', "unknown sampling parameter ''; known are bad_words, "),
            ('{"%s": 1}' % ("x" * 10_000), "unknown sampling parameter 'xxx"),
            ('{"best_of": 2}', "unknown sampling parameter 'best_of'"),
            ('{"temperature": "hot"}', "temperature must be a number, got 'hot'"),
            ('{"temperature": "nan"}', "temperature must be a finite number"),
            ('{"temperature": NaN}', "temperature must be a finite number"),
            ('{"temperature": -Infinity}', "temperature must be a finite number"),
            ('{"temperature": 1e999}', "temperature must be a finite number"),
            ('{"temperature": -0.5}', "temperature must be at least 0"),
            ('{"top_p": -1}', "top_p must be more than 0 and at most 1, got -1"),
            ('{"top_p": 2}', "top_p must be more than 0 and at most 1, got 2"),
            ('{"max_tokens": "16.5"}', "max_tokens must be an integer, got '16.5'"),
            ('{"max_tokens": true}', "max_tokens must be an integer"),
            ('{"max_tokens": 1e308}', "max_tokens must be between 1"),
            ('{"max_tokens": [1]}', "max_tokens must be an integer"),
            ('{"stop": 1}', "stop must be a list"),
            ('{"stop": [1]}', "stop must be a list of strings"),
            ('{"logit_bias": {"x": 1}}', "logit_bias's token id must be an integer"),
            ('{"logit_bias": [1]}', "logit_bias must be an object"),
            ("[]", "must be a JSON object, got list"),
            ("1", "must be a JSON object, got int"),
            ("null", "must be a JSON object, got NoneType"),
            ("", "not valid JSON; send one JSON object"),
            ("{} {}", "not valid JSON"),
            (b"\xff", "not valid JSON"),
            ("\ud800", "not valid JSON"),
            ("[" * 200_000, "not valid JSON"),
            ('{"stop": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
            ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
            ('{"seed": "' + "9" * 5000 + '"}', "seed must be an integer"),
            ('{"seed": ' + "9" * 4000 + "}", "seed must be between"),
        ],
        ids=range(32),
    )
    def test_says_what_is_wrong(self, text: str | bytes, message: str) -> None:
        with pytest.raises(InvalidSamplingParams, match=message) as caught:
            from_json(text)
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("depth", [10, 900, 980, 990])
    def test_deep_values_are_refused_not_fallen_into(self, depth: int) -> None:
        for name in (*LISTS, "temperature", "logit_bias", "n", "ignore_eos"):
            with pytest.raises(InvalidSamplingParams):
                from_json(f'{{"{name}": {"[" * depth}{"]" * depth}}}')


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", "-1", "nan", "true", 2**31, 2**64, 10**400, "1e400"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)


class TestProperties:
    @settings(max_examples=400, deadline=None)
    @given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), values, max_size=4))
    def test_any_json_makes_parameters_or_one_kind_of_error(self, mapping: dict[str, Any]) -> None:
        try:
            params = from_json(json.dumps(mapping))
        except InvalidSamplingParams as error:
            assert str(error)  # noqa: PT017
        else:
            assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params

    @settings(max_examples=100, deadline=None)
    @given(st.text() | st.binary())
    def test_any_text_makes_parameters_or_one_kind_of_error(self, text: str | bytes) -> None:
        try:
            from_json(text)
        except InvalidSamplingParams as error:
            assert "JSON" in str(error)  # noqa: PT017

    @settings(max_examples=100, deadline=None)
    @given(
        temperature=st.floats(0, 1e6),
        top_k=st.integers(-1, 100),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        max_tokens=st.none() | st.integers(16, 2**31 - 1),
        stop=st.lists(st.text(min_size=1, max_size=5), max_size=4),
        bad_words_token_ids=st.lists(st.lists(st.integers(0, 99), max_size=3), max_size=3),
        logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=4),
        ignore_eos=st.booleans(),
    )
    def test_own_fields_make_the_same_again(self, **fields: Any) -> None:
        params = SamplingParams(**fields)
        assert SamplingParams.from_mapping(msgspec.structs.asdict(params)) == params
        assert from_json(json.dumps(msgspec.structs.asdict(params))) == params
        assert params.replace() == params

    def test_a_copy_is_checked_too(self) -> None:
        with pytest.raises(InvalidSamplingParams, match="max_tokens must be"):
            SamplingParams().replace(max_tokens=0)
