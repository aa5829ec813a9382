# SPDX-License-Identifier: Apache-2.0
"""Reading tensors and request parameters: shapes, text, word lists, the time limit, what is refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from fakes import pb_utils
from wavetrain_engine.errors import RequestError
from wavetrain_engine.serving.contracts import ENGINE, ENSEMBLE, LLM, Contract
from wavetrain_engine.serving.request_parameters import RequestParameters
from wavetrain_engine.serving.row_inputs import read_row, split_word_list
from wavetrain_engine.serving.tensors import RequestTensors


def read(array: Any, *, has_batch_dimension: bool) -> RequestTensors:
    return RequestTensors(pb_utils.InferenceRequest({"x": array}), has_batch_dimension=has_batch_dimension)


@pytest.mark.parametrize(
    ("array", "has_batch_dimension", "rows"),
    [
        (np.array([[7], [8]]), True, [7, 8]),
        (np.array([7, 8]), True, [7, 8]),  # a scalar that Triton reshaped to []
        (np.array([7]), False, [7]),
        (np.array([[b"a"]], dtype=np.object_), True, [b"a"]),
        (np.array([b"a"], dtype=np.object_), True, [b"a"]),
        (np.zeros((1, 0)), True, [None]),
    ],
)
def test_scalars_by_row(array: Any, has_batch_dimension: bool, rows: list[Any]) -> None:
    tensors = read(array, has_batch_dimension=has_batch_dimension)
    assert [tensors.scalar("x", row) for row in range(tensors.num_rows)] == rows
    assert tensors.scalar("absent", 0) is None


def test_rows_of_inputs_must_match() -> None:
    request = pb_utils.InferenceRequest({"a": np.zeros((2, 1)), "b": np.zeros((3, 1))})
    with pytest.raises(RequestError, match="different batch sizes"):
        RequestTensors(request, has_batch_dimension=True)


def test_more_than_one_element_is_refused() -> None:
    with pytest.raises(RequestError, match="x must have one element per prompt, got 2"):
        read(np.array([[7, 8]]), has_batch_dimension=True).scalar("x", 0)


def test_texts_skip_the_padding_of_rows() -> None:
    tensors = read(np.array([[b"one", b""], ["zw\u00f6lf".encode(), b"x"]], dtype=np.object_), has_batch_dimension=True)
    assert [tensors.texts("x", row) for row in range(2)] == [["one"], ["zwölf", "x"]]


@pytest.mark.parametrize(
    ("ids", "ends", "words"),
    [
        ([1, 2, 3], [2, 3, -1], [[1, 2], [3]]),
        ([0], [-1], []),
        ([], [], []),
        ([5], [1], [[5]]),
    ],
)
def test_word_lists(ids: list[int], ends: list[int], words: list[list[int]]) -> None:
    assert split_word_list("w", np.array([ids, ends], dtype=np.int32)) == words


@pytest.mark.parametrize("ends", [[2, 2, -1], [4, -1, -1], [0, 1, 2], [2, 1, -1], [-5, 1, 2]])
def test_broken_word_lists_are_refused(ends: list[int]) -> None:
    with pytest.raises(RequestError, match="increasing ends of words, at most 3"):
        split_word_list("w", np.array([[1, 2, 3], ends], dtype=np.int32))


@pytest.mark.parametrize("contract", [ENGINE, ENSEMBLE, LLM], ids=["engine", "ensemble", "llm"])
def test_every_unsupported_input_is_named_when_it_asks_for_something(contract: Contract) -> None:
    for name, neutral in contract.refused.items():
        asking = np.array([[0.75]], dtype=np.float32)
        tensors = RequestTensors(pb_utils.InferenceRequest({name: asking}), has_batch_dimension=True)
        with pytest.raises(RequestError, match=f"^{name} .*is not supported yet"):
            read_row(tensors, contract, 0)
        for value in neutral:
            harmless = pb_utils.InferenceRequest({name: np.array([[value]], dtype=np.float32)})
            read_row(RequestTensors(harmless, has_batch_dimension=True), contract, 0)
        empty = pb_utils.InferenceRequest({name: np.zeros((1, 0), dtype=np.float32)})
        read_row(RequestTensors(empty, has_batch_dimension=True), contract, 0)


def test_nan_is_never_neutral() -> None:
    tensors = RequestTensors(
        pb_utils.InferenceRequest({"len_penalty": np.array([[np.nan]], dtype=np.float32)}), has_batch_dimension=True
    )
    with pytest.raises(RequestError, match="len_penalty = nan"):
        read_row(tensors, ENGINE, 0)


def parameters(values: dict[str, Any], timeout_us: int = 0) -> RequestParameters:
    return RequestParameters.read(pb_utils.InferenceRequest({}, parameters=values, timeout_us=timeout_us))


def test_parameters_of_a_request() -> None:
    before_s = time.monotonic()
    read_ = parameters({"priority": 4, "timeout_ms": 1500, "cache_salt": "a", "id": "x", "triton_y": 1, "other": 2})
    assert (read_.priority, read_.cache_salt, read_.others) == (4, "a", {"other": 2})
    assert read_.deadline_s is not None
    assert 1.4 < read_.deadline_s - before_s < 10.0
    with pytest.raises(RequestError, match="unknown request parameter 'other'"):
        read_.refuse_others()
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert parameters({"traceparent": trace}).traceparent == trace
    assert parameters({"traceparent": "0" * 300}).traceparent == ""  # none, and no reason to fail a request
    nothing = parameters({})
    nothing.refuse_others()
    assert (nothing.priority, nothing.deadline_s, nothing.cache_salt) == (0, None, "")


def test_triton_s_own_timeout_is_a_deadline_in_microseconds() -> None:
    before_s = time.monotonic()
    for read_ in (parameters({}, timeout_us=2_000_000), parameters({"timeout": 2_000_000})):
        assert read_.deadline_s is not None
        assert 1.9 < read_.deadline_s - before_s < 10.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"request_priority": 1, "priority": 1}, "are the same parameter"),
        ({"request_priority": True}, "request_priority must be an integer"),
        ({"request_priority": 2**40}, "request_priority must be an integer"),
        ({"timeout_ms": 0}, "timeout_ms must be a number, more than 0"),
        ({"timeout_ms": "soon"}, "timeout_ms must be a number"),
        ({"timeout_ms": True}, "timeout_ms must be a number"),
        ({"timeout_ms": 5, "timeout": 5}, "both limit the time"),
        ({"cache_salt": 5}, "cache_salt must be a string"),
        ({"traceparent": 5}, "traceparent must be a string"),
    ],
)
def test_bad_parameters_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parameters(values)
