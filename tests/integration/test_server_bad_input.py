# SPDX-License-Identifier: Apache-2.0
"""Bad input to the real server: a clear error each, and the server goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpc_aio

from fakes.triton_calls import Stream, generate, open_stream, read
from fakes.triton_server import RunningServer

pytestmark = pytest.mark.server

OK = {"text_input": "x", "max_tokens": 4}
IDS = {"input_ids": [5, 6], "input_lengths": 2, "request_output_len": 4}
VLLM = {"text_input": "x"}
BIG = np.zeros((2, 4), dtype=np.float16)


def sampling(json_text: str) -> dict[str, Any]:
    return VLLM | {"sampling_parameters": json_text}


TEXT_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("empty prompt", OK | {"text_input": ""}, "invalid: text_input is empty"),
    ("invalid UTF-8", OK | {"text_input": b"ab\xff\xfe"}, "invalid: text_input is not valid UTF-8 (byte 2)"),
    ("10 MB prompt", OK | {"text_input": "x" * 10_000_000}, "invalid: the prompt has 10000000 bytes"),
    ("long prompt", OK | {"text_input": "x y " * 3000}, "invalid: "),
    ("max_tokens 0", OK | {"max_tokens": 0}, "invalid: max_tokens must be"),
    ("max_tokens negative", OK | {"max_tokens": -5}, "invalid: max_tokens must be"),
    ("NaN temperature", OK | {"temperature": float("nan")}, "invalid: temperature must be a finite number"),
    ("infinite temperature", OK | {"temperature": float("inf")}, "invalid: temperature must be a finite number"),
    ("negative temperature", OK | {"temperature": -1.0}, "invalid: temperature must be"),
    ("top_p -1", OK | {"top_p": -1.0}, "invalid: top_p must be"),
    ("top_p 2", OK | {"top_p": 2.0}, "invalid: top_p must be"),
    ("top_k -2", OK | {"top_k": -2}, "invalid: top_k must be"),
    ("10,000 stop words", OK | {"stop_words": [f"s{i}" for i in range(10_000)]}, "invalid: there are 10000 stop words"),
    ("10,000 bad words", OK | {"bad_words": [f"s{i}" for i in range(10_000)]}, "invalid: there are 10000 bad words"),
    ("long stop word", OK | {"stop_words": "s" * 5000}, "invalid: stop has a string of 5000 characters"),
    ("beams", OK | {"beam_width": 4}, "invalid: beam_width = 4 is not supported yet"),
    ("prompt table", OK | {"prompt_embedding_table": BIG}, "invalid: prompt_embedding_table is not supported yet"),
    ("lora id", OK | {"lora_task_id": 3}, "invalid: lora_task_id is not supported yet"),
    ("lora weights", OK | {"lora_weights": BIG}, "invalid: lora_weights is not supported yet"),
    ("logits", OK | {"return_context_logits": True}, "invalid: return_context_logits = true is not supported yet"),
    ("guide", OK | {"guided_decoding_guide": "{}"}, "invalid: guided_decoding_guide is not supported yet"),
    ("length penalty", OK | {"length_penalty": 0.5}, "invalid: "),
    ("decoder text", OK | {"decoder_text_input": "x"}, "invalid: decoder_text_input is not supported yet"),
    ("end_id", OK | {"end_id": 10_000_000}, "invalid: end_id must be"),
    ("min over max", OK | {"min_tokens": 9}, "invalid: min_tokens (9) is more than max_tokens (4)"),
    ("two names", OK | {"min_tokens": 1, "min_length": 1}, "invalid: "),
    ("bias words", OK | {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, "invalid: "),
]
LLM_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("not JSON", sampling("{"), "invalid: sampling_parameters is not valid JSON"),
    ("not an object", sampling("[1]"), "invalid: sampling_parameters must be a JSON object"),
    ("deep JSON", sampling("[" * 100_000), "invalid: sampling_parameters is not valid JSON"),
    ("unknown key", sampling('{"temprature": 1}'), "did you mean 'temperature'?"),
    ("wrong type", sampling('{"top_k": [1]}'), "invalid: top_k must be an integer"),
    ("too many stops", sampling(f'{{"stop": {["s"] * 10_000}}}'.replace("'", '"')), "invalid: stop has 10000 entries"),
    ("huge n", sampling('{"n": 100000}'), "invalid: n must be between"),
    ("2**31 tokens", sampling('{"max_tokens": 2147483648}'), "invalid: max_tokens must be"),
    ("prompt logprobs", sampling('{"prompt_logprobs": 101}'), "invalid: prompt_logprobs must be between"),
    ("two prompts", VLLM | {"input_ids": [1, 2]}, "invalid: input_ids and text_input both give the prompt"),
    (
        "a foreign id",
        VLLM | {"text_input": "", "input_ids": [1, 1 << 30]},
        "invalid: prompt token id 1073741824 is not",
    ),
    ("no messages", VLLM | {"text_input": "", "messages": "[]"}, "invalid: messages must hold between 1 and"),
    ("messages of text", VLLM | {"text_input": "", "messages": '["hi"]'}, "invalid: messages must hold between 1 and"),
    ("broken messages", VLLM | {"text_input": "", "messages": "[{"}, "invalid: messages is not valid JSON"),
    ("image", VLLM | {"image": "aGk="}, "invalid: image is not supported yet"),
    ("prompt in a stream", VLLM | {"stream": True, "exclude_input_in_output": False}, "invalid: exclude_input_in"),
    ("twice", OK | {"sampling_parameters": '{"max_tokens": 3}'}, "invalid: the input max_tokens and sampling_param"),
]
ENGINE_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("id too large", IDS | {"input_ids": [5, 4_000_000]}, "invalid: "),
    ("negative id", IDS | {"input_ids": [5, -7]}, "invalid: "),
    ("no ids", IDS | {"input_lengths": 0}, "invalid: "),
    ("length beyond ids", IDS | {"input_lengths": 3}, "invalid: input_lengths must be between 0 and"),
    ("draft", IDS | {"draft_input_ids": [1]}, "invalid: draft_input_ids is not supported yet"),
    ("word list", IDS | {"stop_words_list": np.array([[5, 6], [9, -1]], dtype=np.int32)}, "invalid: stop_words_list"),
    ("bias", IDS | {"embedding_bias": [1.0, 2.0]}, "invalid: embedding_bias must have one value per token"),
    ("decay", IDS | {"runtime_top_p_decay": 0.5}, "invalid: runtime_top_p_decay = 0.5 is not supported yet"),
    ("retention", IDS | {"retention_decode_priority": 50}, "invalid: retention_decode_priority is not supported"),
    ("missing", {"input_ids": [5], "input_lengths": 1}, "invalid: the input request_output_len is missing"),
]


@pytest.fixture(autouse=True)
async def _goes_on(triton_server: RunningServer) -> Any:
    """After each test the server answers, holds nothing, and has shown no client a path or a stack."""
    yield
    stream = await generate(triton_server.grpc_url, "llm", OK)
    assert not stream.errors
    assert triton_server.wait_until_idle(1.0).num_blocks_used == 0


def check_error(stream: Stream, expected: str) -> None:
    assert not stream.chunks
    (message,) = stream.errors
    assert expected in message
    assert not any(sign in message for sign in ("Traceback", ".py", "/work", "shm", "\n"))


@pytest.mark.parametrize("model", ["ensemble", "llm"])
async def test_bad_text_requests(triton_server: RunningServer, model: str) -> None:
    for _, inputs, expected in TEXT_CASES:
        started_s = time.monotonic()
        check_error(await generate(triton_server.grpc_url, model, inputs), expected)
        assert time.monotonic() - started_s < 2.0


async def test_bad_vllm_requests(triton_server: RunningServer) -> None:
    for _, inputs, expected in LLM_CASES:
        check_error(await generate(triton_server.grpc_url, "llm", inputs), expected)


async def test_bad_engine_requests(triton_server: RunningServer) -> None:
    for _, inputs, expected in ENGINE_CASES:
        check_error(await generate(triton_server.grpc_url, "engine", inputs), expected)


@pytest.mark.parametrize("model", ["ensemble", "llm"])
async def test_bad_request_parameters(triton_server: RunningServer, model: str) -> None:
    for parameters, expected in [
        ({"request_priority": "high"}, "invalid: request_priority must be an integer"),
        ({"timeout_ms": -1}, "invalid: timeout_ms must be a number"),
        ({"cache_salt": "s" * 1000}, "invalid: cache_salt must be a string"),
        ({"nonsense": 1}, "invalid: unknown request parameter 'nonsense'"),
    ]:
        check_error(await generate(triton_server.grpc_url, model, OK, parameters=parameters), expected)


@pytest.mark.parametrize("model", ["ensemble", "llm", "engine"])
async def test_missing_text_or_ids(triton_server: RunningServer, model: str) -> None:
    stream = await generate(triton_server.grpc_url, model, {"temperature": 1.0})
    assert not stream.chunks
    assert len(stream.errors) == 1


async def test_wrong_dtypes_and_shapes_are_triton_s_own_errors(triton_server: RunningServer) -> None:
    wrong: list[dict[str, Any]] = [
        OK | {"max_tokens": np.array([4], dtype=np.int64)},
        OK | {"max_tokens": np.array([[4, 5]], dtype=np.int32)},
        OK | {"text_input": np.array([1], dtype=np.int32)},
    ]
    for inputs in wrong:
        stream = await generate(triton_server.grpc_url, "llm", inputs)
        assert not stream.chunks
        assert len(stream.errors) == 1


async def test_deadline_ends_a_running_request(triton_server: RunningServer) -> None:
    for model in ("llm", "ensemble"):
        inputs = OK | {"max_tokens": 1500, "end_id": -1, "stream": True}
        stream = await generate(triton_server.grpc_url, model, inputs, parameters={"timeout_ms": 200})
        (message,) = stream.errors
        assert "deadline: " in message


async def test_full_queue_is_busy(triton_server: RunningServer) -> None:
    """5 times 128 sequences are more than the 64 that run and the 512 that wait: one request is told, at once."""
    async with grpc_aio.InferenceServerClient(triton_server.grpc_url) as client:
        inputs = {"text_input": "x", "sampling_parameters": '{"n": 128, "max_tokens": 240, "ignore_eos": true}'}
        calls = [await open_stream(client, "llm", inputs) for _ in range(5)]
        tasks = [asyncio.create_task(read(call, Stream())) for call in calls]
        done, _ = await asyncio.wait(tasks, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        for call in calls:
            call.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    check_error(done.pop().result(), "busy: ")
