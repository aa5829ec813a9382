# SPDX-License-Identifier: Apache-2.0
"""The client against the server's side of the border: the models' config.pbtxt and the engine's error words."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fakes.triton import FakeTriton, reply, serve
from wavetrain_client import AsyncClient, Client, GenerationRequest, RequestRejected, ServerFailed
from wavetrain_client.errors import ERROR_CLASSES, error_from_message
from wavetrain_client.options import OPTION_NAMES
from wavetrain_client.protocol import to_message
from wavetrain_client.wire import encode_request, encode_stop
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.request import FinishReason
from wavetrain_engine.sampling_params import SamplingParams

REPOSITORY = Path(__file__).parents[2] / "model_repository"
MODELS = ("llm", "ensemble", "engine")
# A value for every option, of the kind the option takes.
VALUES = {
    "n": 2,
    "max_tokens": 8,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 4,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 1.0},
    "seed": 7,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2, 3],
    "bad_words": ["c"],
    "bad_words_token_ids": [[1, 2], [3]],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "echo": True,
    "return_perf_metrics": True,
}


def read_config(model):
    text = (REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def check_fits(message, config):
    """Every tensor is declared with this type and a shape that it fits; every required one is there."""
    declared = {tensor.name: tensor for tensor in config.input}
    for tensor in message.inputs:
        want = declared[tensor.name]
        type_name = model_config_pb2.DataType.Name(want.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        assert tensor.datatype == type_name, tensor.name
        dims = ([1] if config.max_batch_size else []) + list(want.dims)
        assert len(tensor.shape) == len(dims), tensor.name
        fits = [want in (-1, have) for want, have in zip(dims, tensor.shape, strict=True)]
        assert all(fits), (tensor.name, dims, tensor.shape)
    required = {tensor.name for tensor in config.input if not tensor.optional}
    assert required <= {tensor.name for tensor in message.inputs}


@pytest.mark.parametrize("model", MODELS)
def test_what_the_client_sends_is_what_the_model_declares(model):
    config = read_config(model)
    prompt = [1, 2, 3] if model == "engine" else "text"
    assert set(VALUES) == set(OPTION_NAMES)
    carried, refused = [], {}
    for name, value in VALUES.items():
        request = GenerationRequest(prompt=prompt, model=model, options={name: value})
        try:
            check_fits(to_message(encode_request(request)), config)
        except RequestRejected as refusal:
            refused[name] = str(refusal)
        else:
            carried.append(name)
    assert all(name in message for name, message in refused.items())
    assert set(carried) == set(OPTION_NAMES) if model == "llm" else "max_tokens" in carried


@pytest.mark.parametrize("model", MODELS)
async def test_both_clients_send_the_same(model):
    async def answer(request):
        yield reply("a", "stop")

    options = {}
    prompt = [1, 2, 3] if model == "engine" else "né"
    for name, value in VALUES.items():
        request = GenerationRequest(prompt=prompt, model=model, options={name: value})
        with contextlib.suppress(RequestRejected):
            encode_request(request)
            options[name] = value
    del options["echo"]  # not with n
    given = {"model": model, "priority": -1, "cache_salt": "s", "request_id": "r", **options}
    async with serve(FakeTriton(answer)) as fake:
        async with AsyncClient(fake.url) as client:
            await client.generate(prompt, **given)
        with Client(fake.url) as client:
            await asyncio.to_thread(client.generate, prompt, **given)
    assert fake.requests[0] == fake.requests[1]
    assert fake.requests[0].parameters == {"request_priority": -1, "cache_salt": "s"}


def test_the_stop_request_fits_the_engine():
    check_fits(to_message(encode_stop("r")), read_config("engine"))


def test_the_clients_sampling_options_are_the_engines():
    others = {"echo", "return_perf_metrics"}
    assert set(OPTION_NAMES) - others <= set(SamplingParams.__struct_fields__)


def test_every_error_word_of_the_engine_has_a_class_in_the_client():
    assert {code.value for code in ErrorCode} == set(ERROR_CLASSES)
    for code in ErrorCode:
        error = error_from_message(f"{code.value}: what to do")
        assert type(error) is ERROR_CLASSES[code.value]
        assert (error.word, str(error)) == (code.value, "what to do")
    assert type(error_from_message("dead: x")) is ServerFailed


def test_finish_reasons_have_the_same_spelling():
    assert {reason.value for reason in FinishReason} == {"stop", "length", "cancelled", "error"}
