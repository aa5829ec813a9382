# SPDX-License-Identifier: Apache-2.0
"""Requests of the tools that speak the legacy contract and vLLM's, unchanged, and what is asked of the answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fakes.triton_calls import generate, post
from fakes.triton_server import RunningServer

pytestmark = pytest.mark.server

PROMPT = "def __init__(self"


@pytest.mark.parametrize(
    "payload",
    [
        # genai-perf, backend tensorrtllm, with --streaming and deterministic output lengths
        {"text_input": PROMPT, "max_tokens": 12, "min_length": 12, "exclude_input_in_output": True, "stream": True},
        # genai-perf without streaming, with --extra-inputs
        {"text_input": PROMPT, "max_tokens": 12, "exclude_input_in_output": True, "temperature": 0.5, "top_k": 4},
        # TensorRT-LLM's end_to_end_grpc_client.py
        {
            "text_input": PROMPT,
            "max_tokens": 12,
            "bad_words": [""],
            "stop_words": [""],
            "stream": True,
            "beam_width": 1,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "temperature": 1.0,
            "return_context_logits": False,
            "return_generation_logits": False,
            "end_id": 2,
            "pad_id": 2,
        },
        # Triton's OpenAI front end
        {
            "text_input": PROMPT,
            "max_tokens": 12,
            "stream": True,
            "stop_words": ["\n\n"],
            "top_p": 0.9,
            "temperature": 0.7,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "seed": 7,
            "exclude_input_in_output": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        },
    ],
    ids=["genai-perf-stream", "genai-perf", "end-to-end-client", "openai-front-end"],
)
async def test_legacy_tools_requests(triton_server: RunningServer, payload: dict[str, Any]) -> None:
    for model in ("ensemble", "llm"):
        stream = await generate(triton_server.grpc_url, model, payload)
        assert not stream.errors
        assert stream.text
        assert all(chunk.outputs["text_output"].size == 1 for chunk in stream.chunks)
        if not payload.get("stream"):
            assert len(stream.chunks) == 1


@pytest.mark.parametrize("model", ["ensemble", "llm"])
def test_tensorrt_llm_tutorial_curl(triton_server: RunningServer, model: str) -> None:
    body = {"text_input": PROMPT, "max_tokens": 20, "bad_words": "", "stop_words": "", "pad_id": 2, "end_id": 2}
    status, answer = post(f"{triton_server.http_url}/v2/models/{model}/generate", body)
    assert status == 200
    assert answer["text_output"].startswith(PROMPT)


async def test_genai_perf_vllm_request_with_numbers_as_strings(triton_server: RunningServer) -> None:
    payload = {
        "text_input": PROMPT,
        "exclude_input_in_output": True,
        "stream": True,
        "sampling_parameters": '{"max_tokens":"9","min_tokens":"9","temperature":"0"}',
        "return_num_output_tokens": True,
        "return_finish_reason": True,
    }
    stream = await generate(triton_server.grpc_url, "llm", payload)
    assert sum(int(chunk.outputs["num_output_tokens"].sum()) for chunk in stream.chunks) == 9
    reasons = [chunk.outputs["finish_reason"].tolist() for chunk in stream.chunks]
    assert reasons == [[b"None"]] * (len(reasons) - 1) + [[b"length"]]


def test_vllm_tutorial_curl(triton_server: RunningServer) -> None:
    """Sampling parameters as request parameters, of which Triton turns those with an input's name into tensors."""
    url = f"{triton_server.http_url}/v2/models/llm/generate"
    body = {"text_input": PROMPT, "parameters": {"stream": False, "temperature": 0, "min_p": 0.1}}
    status, answer = post(url, body)
    assert status == 200
    assert answer["text_output"].startswith(PROMPT)
    status, answer = post(url, body | {"parameters": {"max_new": 3}})
    assert (status, answer["error"].startswith("invalid: unknown sampling parameter 'max_new'")) == (400, True)


async def test_engine_answers_with_tensorrt_llm_s_shapes(triton_server: RunningServer) -> None:
    inputs = {
        "input_ids": [5, 6, 7],
        "input_lengths": 3,
        "request_output_len": 4,
        "end_id": -1,
        "return_log_probs": True,
        "return_perf_metrics": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    whole = await generate(triton_server.grpc_url, "engine", inputs)
    (chunk,) = whole.chunks
    assert chunk.shapes["output_ids"] == [1, 1, 7]
    assert chunk.outputs["output_ids"][0, 0, :3].tolist() == [5, 6, 7]
    assert chunk.outputs["sequence_length"].tolist() == [[7]]
    assert chunk.shapes["output_log_probs"] == [1, 1, 4]
    assert np.isclose(chunk.outputs["output_log_probs"].sum(), chunk.outputs["cum_log_probs"], atol=1e-4)
    names = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
    times = [int(chunk.outputs[name].item()) for name in names]
    assert times == sorted(times)
    assert times[0] > 0
    assert chunk.outputs["kv_cache_alloc_total_blocks"].item() == 1
    assert (chunk.outputs["num_input_tokens"].item(), chunk.outputs["num_output_tokens"].item()) == (3, 4)
    assert not any(name.startswith("detokenizer") for name in chunk.outputs)
    stream = await generate(triton_server.grpc_url, "engine", inputs | {"streaming": True})
    ids = [token_id for item in stream.chunks for token_id in item.outputs["output_ids"][0, 0].tolist()]
    assert ids == chunk.outputs["output_ids"][0, 0, 3:].tolist()


def batch(prompts: list[bytes], **inputs: Any) -> dict[str, Any]:
    """The ensemble's inputs for a batch, one row for each prompt."""
    tensors = {
        "text_input": np.array([[prompt] for prompt in prompts], dtype=np.object_),
        "max_tokens": np.full((len(prompts), 1), 8, dtype=np.int32),
    }
    return tensors | {name: np.array([[value]] * len(prompts)) for name, value in inputs.items()}


async def test_batches_fan_out_and_are_answered_once(triton_server: RunningServer) -> None:
    prompts = [b"import os", b"class A:\n    "]
    singles = [
        (await generate(triton_server.grpc_url, "ensemble", {"text_input": prompt, "max_tokens": 8})).text
        for prompt in prompts
    ]
    whole = await generate(
        triton_server.grpc_url, "ensemble", batch(prompts, num_return_sequences=np.int32(2)), batched=True
    )
    (chunk,) = whole.chunks
    assert chunk.is_final
    texts = [[text.decode() for text in row] for row in chunk.outputs["text_output"].tolist()]
    assert texts == [[single] * 2 for single in singles]
    assert chunk.outputs["batch_index"].tolist() == [[0], [1]]


async def test_streamed_batches_say_what_each_response_is_about(triton_server: RunningServer) -> None:
    prompts = [b"import os", b"class A:\n    "]
    tensors = batch(prompts, stream=True) | {"num_return_sequences": np.array([[1], [2]], dtype=np.int32)}
    stream = await generate(triton_server.grpc_url, "ensemble", tensors, batched=True)
    found: dict[tuple[int, int], str] = {}
    for chunk in stream.chunks:
        key = (chunk.outputs["batch_index"].item(), chunk.outputs["sequence_index"].item())
        found[key] = found.get(key, "") + chunk.text
    assert found.keys() == {(0, 0), (1, 0), (1, 1)}
    assert found[1, 0] == found[1, 1]
    del tensors["stream"]
    stream = await generate(triton_server.grpc_url, "ensemble", tensors, batched=True)
    (error,) = stream.errors
    assert "invalid: num_return_sequences must be the same for all rows" in error


@pytest.mark.parametrize("model", ["llm", "ensemble", "engine"])
def test_generate_answers_n_sequences_at_once(triton_server: RunningServer, model: str) -> None:
    url = f"{triton_server.http_url}/v2/models/{model}/generate"
    wishes = {"exclude_input_in_output": True, "return_log_probs": True, "end_id": -1, "temperature": 0.9}
    body: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 6} | wishes
    if model == "engine":
        body = {"input_ids": [5, 6, 7], "input_lengths": 3, "request_output_len": 6} | wishes
    key = "output_ids" if model == "engine" else "text_output"
    expected: list[Any] = []
    for seed in (7, 8, 9):  # a sequence i of a request with a seed is that of seed + i
        status, answer = post(url, body | {"seed": seed})
        assert status == 200
        expected += answer[key] if isinstance(answer[key], list) else [answer[key]]
    status, answer = post(url, body | {"seed": 7, "num_return_sequences": 3})
    assert (status, answer[key]) == (200, expected)
    assert len(answer["cum_log_probs"]) == 3
    assert len(answer["output_log_probs"]) == 3 * 6
    sums = np.reshape(answer["output_log_probs"], (3, 6)).sum(axis=1)
    assert np.allclose(sums, answer["cum_log_probs"], atol=1e-3)
    if model == "engine":
        assert answer["sequence_length"] == [6, 6, 6]


async def test_vllm_n_answers_in_one_response(triton_server: RunningServer) -> None:
    payload = {"text_input": PROMPT, "sampling_parameters": '{"n": 3, "max_tokens": 6, "seed": 1, "ignore_eos": true}'}
    whole = await generate(triton_server.grpc_url, "llm", payload | {"exclude_input_in_output": True})
    stream = await generate(triton_server.grpc_url, "llm", payload | {"stream": True})
    (chunk,) = whole.chunks
    assert chunk.shapes["text_output"] == [3]
    texts = [b"".join(item.outputs["text_output"][index] for item in stream.chunks) for index in range(3)]
    assert texts == chunk.outputs["text_output"].tolist()


async def test_cache_salt_isolates_and_priority_is_taken(triton_server: RunningServer) -> None:
    inputs = {"text_input": "x = 1\n" * 60, "max_tokens": 2, "return_perf_metrics": True}
    reused: list[int] = []
    for salt in ("one", "two", "one"):
        for model in ("llm", "ensemble"):
            parameters = {"cache_salt": f"{salt}-{model}", "request_priority": -5}
            stream = await generate(triton_server.grpc_url, model, inputs, parameters=parameters)
            reused.append(int(stream.chunks[-1].outputs["kv_cache_reused_blocks"].item()))
    assert reused[:4] == [0, 0, 0, 0]
    assert min(reused[4:]) > 0
