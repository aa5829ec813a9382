# SPDX-License-Identifier: Apache-2.0
"""Requests and responses as bytes: each dialect's tensors, read back without the client's code."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.triton import ReceivedRequest, legacy_reply, reply, tensor_response
from wavetrain_client import ChatPrompt, Chunk, GenerationRequest, Logprob, PerfMetrics, RequestRejected, ServerFailed
from wavetrain_client.chunk import join_chunks
from wavetrain_client.protocol import to_message
from wavetrain_client.tensor import encode_tensor
from wavetrain_client.wire import decode_response, encode_request, encode_stop


def received(prompt, *, model="llm", timeout_s=None, **kwargs) -> ReceivedRequest:
    names = {"is_streaming", "priority", "cache_salt", "request_id"}
    known = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    request = GenerationRequest(prompt=prompt, model=model, options=kwargs, **known)
    return ReceivedRequest.read(to_message(encode_request(request, timeout_s=timeout_s)), None)


def test_llm_sends_one_json_object_and_flags_without_a_batch_dimension():
    got = received(
        "café", max_tokens=7, temperature=0.5, stop=("a", "b"), logit_bias={5: -1.0}, top_k=None, request_id="r1"
    )
    assert (got.model, got.request_id) == ("llm", "r1")
    assert got.inputs["text_input"] == ["café".encode()]
    assert json.loads(got.inputs["sampling_parameters"][0]) == {
        "max_tokens": 7,
        "temperature": 0.5,
        "stop": ["a", "b"],
        "logit_bias": {"5": -1.0},
    }
    assert got.inputs["stream"] == [True]
    assert got.inputs["exclude_input_in_output"] == [True]
    assert {name for name in got.inputs if name.startswith("return_")} == {
        "return_finish_reason",
        "return_num_input_tokens",
        "return_num_output_tokens",
    }
    assert all(shape == [1] for shape in got.shapes.values())


def test_llm_takes_token_ids_and_messages_in_place_of_text():
    got = received([7, 8, 9])
    assert (got.inputs["text_input"], got.inputs["input_ids"], got.shapes["input_ids"]) == ([b""], [7, 8, 9], [3])
    messages = [{"role": "user", "content": "né"}]
    got = received(ChatPrompt(messages=messages, variables={"add_generation_prompt": True}))
    assert got.inputs["text_input"] == [b""]
    assert json.loads(got.inputs["messages"][0]) == messages
    assert json.loads(got.inputs["template_variables"][0]) == {"add_generation_prompt": True}
    with pytest.raises(RequestRejected, match="must be JSON values"):
        ChatPrompt(messages=[{"role": object()}])


def test_prompt_logprobs_come_once_and_the_first_token_has_none():
    entries = [{"5": {"logprob": None, "rank": None, "decoded_token": "a"}}, {"6": {"logprob": -1.5, "rank": 2}}]
    (chunk,) = decode_response(
        tensor_response(
            text_output=("BYTES", [1], ["x"]), prompt_logprobs=("BYTES", [1], [json.dumps(entries)])
        ).infer_response
    )
    first, second = chunk.prompt_logprobs
    assert math.isnan(first[5].logprob)
    assert second == {6: Logprob(-1.5, 2)}


def test_llm_asks_for_logprobs_and_metrics_only_when_wanted():
    got = received("x", logprobs=0, return_perf_metrics=True, echo=True, is_streaming=False)
    assert {"return_logprobs", "return_cumulative_logprob", "return_perf_metrics"} <= set(got.inputs)
    assert got.inputs["exclude_input_in_output"] == [False]
    assert got.inputs["stream"] == [False]
    assert json.loads(got.inputs["sampling_parameters"][0]) == {"logprobs": 0}


def test_ensemble_sends_one_tensor_for_each_option_with_a_batch_dimension():
    got = received(
        "x", model="ensemble", max_tokens=9, top_k=3, top_p=0.5, seed=2**64 - 1, stop="\n", bad_words=["a", "bc"], n=2
    )
    assert got.inputs["text_input"] == [b"x"]
    assert got.inputs["max_tokens"] == [9]
    assert got.inputs["seed"] == [2**64 - 1]
    assert got.inputs["num_return_sequences"] == [2]
    assert got.inputs["stop_words"] == [b"\n"]
    assert got.inputs["bad_words"] == [b"a", b"bc"]
    assert got.shapes["bad_words"] == [1, 2]
    assert got.shapes["text_input"] == [1, 1]
    assert got.datatypes["top_k"] == "INT32"
    assert got.datatypes["top_p"] == "FP32"


@pytest.mark.parametrize(("model", "prompt", "flag"), [("ensemble", "x", "stream"), ("engine", [5], "streaming")])
def test_several_sequences_are_streamed_by_the_legacy_contracts(model, prompt, flag):
    assert received(prompt, model=model, is_streaming=False).inputs[flag] == [False]
    assert received(prompt, model=model, is_streaming=False, n=1, echo=True).inputs[flag] == [False]
    assert received(prompt, model=model, is_streaming=False, n=2).inputs[flag] == [True]
    assert received("x", is_streaming=False, n=2).inputs["stream"] == [False]
    with pytest.raises(RequestRejected, match="echo with n > 1 cannot be sent to the model"):
        received(prompt, model=model, is_streaming=False, n=2, echo=True)


def test_one_count_for_several_sequences_is_nobody_s():
    message = tensor_response(text_output=("BYTES", [1, 2], ["a", "b"]), num_output_tokens=("INT32", [1, 1], [5]))
    assert [chunk.num_output_tokens for chunk in decode_response(message.infer_response)] == [None, None]
    message = tensor_response(
        output_ids=("INT32", [1, 2, 3], [1, 2, 3, 4, -1, -1]),
        sequence_length=("INT32", [1, 2], [3, 1]),
        num_output_tokens=("INT32", [1, 1], [4]),
    )
    assert [chunk.num_output_tokens for chunk in decode_response(message.infer_response)] == [3, 1]


def test_ignoring_the_end_is_the_legacy_contracts_end_id_of_minus_one():
    assert received("x", model="ensemble", ignore_eos=True).inputs["end_id"] == [-1]
    assert "end_id" not in received("x", model="ensemble", ignore_eos=False).inputs


def test_engine_takes_token_ids_and_word_lists():
    got = received(
        [5, 6, 7], model="engine", top_k=1, stop_token_ids=[9, 8], bad_words_token_ids=[[1, 2, 3], [4]], logprobs=0
    )
    assert got.inputs["input_ids"] == [5, 6, 7]
    assert got.inputs["input_lengths"] == [3]
    assert got.inputs["request_output_len"] == [16]
    assert got.inputs["runtime_top_k"] == [1]
    assert "end_id" not in got.inputs
    assert got.inputs["streaming"] == [True]
    assert got.inputs["return_log_probs"] == [True]
    assert (got.shapes["stop_words_list"], got.inputs["stop_words_list"]) == ([1, 2, 2], [9, 8, 1, 2])
    assert (got.shapes["bad_words_list"], got.inputs["bad_words_list"]) == ([1, 2, 4], [1, 2, 3, 4, 3, 4, -1, -1])


@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_priority_deadline_and_salt_travel_as_parameters(model):
    got = received("x", model=model, priority=-3, cache_salt="tenant", timeout_s=1.5)
    assert got.parameters == {"request_priority": -3, "cache_salt": "tenant", "timeout_ms": 1500}


def test_nothing_is_sent_for_what_was_not_given():
    assert received("x").parameters == {}
    assert received("x").request_id != received("x").request_id


def test_stop_names_the_request_and_carries_the_engine_contracts_required_inputs():
    got = ReceivedRequest.read(to_message(encode_stop("r7")), None)
    assert (got.model, got.request_id) == ("engine", "r7")
    assert got.inputs == {"stop": [True], "input_lengths": [0], "request_output_len": [0]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": [1, 2], "model": "ensemble"}, "takes text"),
        ({"prompt": ChatPrompt(messages=[{}]), "model": "engine"}, "takes token ids"),
        ({"prompt": [2**40]}, "input_ids must be an integer that fits INT32"),
        ({"prompt": "x", "model": "engine"}, "takes token ids"),
        ({"prompt": "x", "model": "ensemble", "min_p": 0.1}, "min_p cannot be sent to the model 'ensemble'"),
        ({"prompt": "x", "model": "ensemble", "logprobs": 3}, "logprobs=0"),
        ({"prompt": "x", "model": "ensemble", "max_tokens": 2**31}, "max_tokens must be an integer that fits INT32"),
        ({"prompt": "x", "model": "ensemble", "max_tokens": "9"}, "max_tokens must be"),
        ({"prompt": "x", "model": "ensemble", "seed": -1}, "seed must be an integer that fits UINT64"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "x", "stop": object()}, "plain numbers"),
        ({"prompt": [1, "2"], "model": "engine"}, "must hold integers"),
        ({"prompt": 5}, "must be text, a list of token ids or a ChatPrompt"),
        ({"prompt": "x", "priority": 2**40}, "priority must fit"),
        ({"prompt": "x", "request_id": ""}, "request_id must not be empty"),
    ],
)
def test_what_a_contract_cannot_carry_is_refused_by_name(arguments, words):
    with pytest.raises(RequestRejected, match=words):
        received(**arguments)


def test_an_unknown_option_names_the_nearest_one():
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        GenerationRequest(prompt="x", options={"temprature": 1.0})


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused(timeout_s):
    with pytest.raises(RequestRejected, match="timeout_s"):
        GenerationRequest(prompt="x", timeout_s=timeout_s)


def test_llm_response_becomes_one_chunk():
    (chunk,) = decode_response(reply("né", "stop", num_tokens=2, num_input=4).infer_response)
    assert chunk == Chunk(text="né", finish_reason="stop", num_input_tokens=4, num_output_tokens=2)


def test_several_sequences_in_one_response_become_several_chunks():
    message = tensor_response(
        text_output=("BYTES", [2], ["a", "b"]),
        finish_reason=("BYTES", [2], ["length", "None"]),
        num_output_tokens=("UINT32", [2], [1, 3]),
        cumulative_logprob=("FP32", [2], [-0.5, -2.0]),
        logprobs=("BYTES", [2], ['[{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}]', "null"]),
    )
    first, second = decode_response(message.infer_response)
    assert first.logprobs == ({7: Logprob(-0.5, 1, "a")},)
    assert (first.finish_reason, second.finish_reason) == ("length", None)
    assert (second.sequence_index, second.num_output_tokens, second.cumulative_logprob) == (1, 3, -2.0)


def test_a_response_of_one_later_sequence_keeps_its_index():
    message = tensor_response(text_output=("BYTES", [1, 1], ["a"]), sequence_index=("INT32", [1, 1], [2]))
    assert decode_response(message.infer_response)[0].sequence_index == 2


def test_engine_response_gives_token_ids_cut_to_their_length():
    message = tensor_response(
        output_ids=("INT32", [1, 2, 3], [1, 2, 3, 4, 0, 0]),
        sequence_length=("INT32", [1, 2], [3, 1]),
        output_log_probs=("FP32", [1, 2, 3], [-1, -2, -3, -4, 0, 0]),
        context_logits=("FP32", [1, 1, 1], [0.0]),
    )
    first, second = decode_response(message.infer_response)
    assert (first.token_ids, second.token_ids) == ((1, 2, 3), (4,))
    assert (first.num_output_tokens, second.num_output_tokens) == (3, 1)
    assert first.token_logprobs == (-1.0, -2.0, -3.0)


def test_perf_metrics_and_empty_responses():
    message = tensor_response(text_output=("BYTES", [1, 1], [""]), first_token_time_ns=("INT64", [1, 1], [2**60]))
    assert decode_response(message.infer_response)[0].perf_metrics == PerfMetrics(first_token_time_ns=2**60)
    assert decode_response(tensor_response().infer_response) == []
    empty_ids = tensor_response(output_ids=("INT32", [1, 1, 0], []))
    assert decode_response(empty_ids.infer_response) == [Chunk(num_output_tokens=0)]


@pytest.mark.parametrize(
    "message",
    [
        reply(b"\xff"),
        reply("a", "tired"),
        tensor_response(text_output=("BYTES", [1], ["a"]), logprobs=("BYTES", [1], ["[{]"])),
    ],
)
def test_an_answer_that_makes_no_sense_is_the_servers_failure(message):
    with pytest.raises(ServerFailed):
        decode_response(message.infer_response)


def test_raw_content_that_does_not_fit_its_shape_is_the_servers_failure():
    message = reply("a")
    message.infer_response.raw_output_contents[0] = b"\xff\x00\x00\x00a"
    with pytest.raises(ServerFailed, match="text_output"):
        decode_response(message.infer_response)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_strings_survive_the_wire(values):
    tensor = encode_tensor("x", "BYTES", (len(values),), values)
    assert [value.decode() for value in tensor.values()] == values


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8))
def test_integers_survive_the_wire(values):
    assert encode_tensor("x", "INT32", (1, len(values)), values).values() == values


def test_chunks_add_up_to_a_generation():
    parts = [
        *decode_response(reply("a", num_input=4).infer_response),
        *decode_response(legacy_reply("b", num_tokens=2).infer_response),
        Chunk(finish_reason="length"),
        Chunk(text="other", finish_reason="stop", sequence_index=1),
    ]
    generation = join_chunks("r1", "llm", parts)
    assert (generation.text, generation.finish_reason, generation.num_output_tokens) == ("ab", "length", 3)
    assert generation.outputs[1].text == "other"
    assert generation.num_input_tokens == 3
