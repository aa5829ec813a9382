# SPDX-License-Identifier: Apache-2.0
"""The forms of a prompt that `llm` and `tokenizer` take beside text: token ids, and messages of a chat."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fakes import pb_utils
from fakes.core_client import FACTS, FakeCoreClient
from fakes.tiny_tokenizers import byte_level
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import PromptTooLong, RequestError
from wavetrain_engine.request import FinishReason, RequestStats, TokenLogprobs
from wavetrain_engine.serving.llm_prompt import LlmPrompts
from wavetrain_engine.serving.llm_server import LlmServer
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.serving.tokenizer_server import TokenizerServer
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer

_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if shout %}!{% endif %}"
_MESSAGES = json.dumps([{"role": "user", "content": "hé"}])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("tokenizer"), vocab_size=400))


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    template = ChatTemplate({"default": _TEMPLATE}, {"bos_token": "<s>"})
    yield template
    template.close()


class Files:
    """What a model's `start` asks for."""

    config = EngineConfig()

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, client: FakeCoreClient) -> None:
        self._tokenizer, self._template, self._client = tokenizer, template, client

    def require_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def load_chat_template(self, tokenizer: Tokenizer, *, timeout_s: float) -> ChatTemplate:
        return self._template

    def core_client(self, command: Any) -> FakeCoreClient:
        return self._client


def request_of(*, has_rows: bool = False, **inputs: Any) -> Any:
    arrays: dict[str, Any] = {}
    for name, value in {"text_input": "", **inputs}.items():
        if isinstance(value, str):
            array: Any = np.array([value.encode()], dtype=np.object_)
        elif isinstance(value, bool):
            array = np.array([value])
        else:
            array = np.array(value, dtype=np.int32)
        arrays[name] = array[None] if has_rows else array
    return pb_utils.InferenceRequest(arrays)


def read(prompts: LlmPrompts, **inputs: Any) -> Any:
    return prompts.read(RequestTensors(request_of(**inputs), has_batch_dimension=False))


def test_each_form_gives_its_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    prompts = LlmPrompts(tokenizer, template, 100)
    assert read(prompts, text_input="ab").token_ids == tokenizer.encode("ab")
    ids = read(prompts, input_ids=[5, 6, 7])
    assert (ids.token_ids, prompts.text_of(ids)) == ([5, 6, 7], tokenizer.decode([5, 6, 7]))
    chat = read(prompts, messages=_MESSAGES, template_variables='{"shout": true}')
    assert chat.text == "<user>hé!"
    assert chat.token_ids == tokenizer.encode("<user>hé!", add_special_tokens=False)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "a", "input_ids": [1]}, "input_ids and text_input both give the prompt"),
        ({"input_ids": [1], "messages": _MESSAGES}, "input_ids and messages both give the prompt"),
        ({"messages": "{}"}, "messages must be a JSON array"),
        ({"messages": "[" * 100_000}, "messages is not valid JSON"),
        ({"messages": "[]"}, "messages must hold between 1 and"),
        ({"messages": "[1]"}, "messages must hold between 1 and"),
        ({"messages": _MESSAGES, "template_variables": '{"bos_token": "x"}'}, "must not give 'bos_token'"),
        ({"messages": _MESSAGES, "template_variables": '{"source": "x"}'}, "must not give 'source'"),
        ({"text_input": "a", "template_variables": "{}"}, "is of use with messages only"),
        ({}, "text_input is empty"),
    ],
)
def test_what_is_no_prompt_is_named(
    tokenizer: Tokenizer, template: ChatTemplate, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        read(LlmPrompts(tokenizer, template, 100), **inputs)


def test_messages_need_a_template_and_have_a_limit(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="the checkpoint has no chat template"):
        read(LlmPrompts(tokenizer, None, 100), messages=_MESSAGES)
    long = json.dumps([{"role": "user", "content": "x" * 10_000}])
    with pytest.raises(PromptTooLong, match="far more than 2 tokens"):
        read(LlmPrompts(tokenizer, template, 2), messages=long)


def test_llm_takes_messages_and_answers_with_the_prompt_s_probabilities(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    client, model = FakeCoreClient(), LlmServer()
    model.start(Files(tokenizer, template, client))  # type: ignore[arg-type]
    request = request_of(
        messages=_MESSAGES, sampling_parameters='{"prompt_logprobs": 1, "max_tokens": 1}', return_perf_metrics=True
    )
    try:
        model.execute([request])
        deadline_s = time.monotonic() + 10
        while not client.requests and time.monotonic() < deadline_s:
            time.sleep(0.002)
        (submitted,) = client.requests
        prompt = submitted.prompt_token_ids
        assert prompt == tokenizer.encode("<user>hé", add_special_tokens=False)
        client.send(
            0,
            [70],
            FinishReason.LENGTH,
            prompt_logprobs=[TokenLogprobs([token, 9], [-0.5, -0.25], [2, 1]) for token in prompt[1:]],
            stats=RequestStats(num_cached_tokens=3, num_prompt_tokens=len(prompt)),
        )
        assert request.sender.is_final.wait(10)
        values = request.sender.responses[-1].values()
        first, *others = json.loads(values["prompt_logprobs"][0])
        assert {int(name): entry["logprob"] for name, entry in first.items()} == {prompt[0]: None}
        assert [int(next(iter(entry))) for entry in others] == prompt[1:]
        assert others[0]["9"] == {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.token_text(9)}
        assert values["num_cached_tokens"].tolist() == [3]
    finally:
        model.finalize()


def test_tokenizer_renders_messages_and_leaves_special_tokens_out(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    model = TokenizerServer()
    model.start(Files(tokenizer, template, FakeCoreClient()))  # type: ignore[arg-type]
    (chat,) = model.execute([request_of(has_rows=True, messages=_MESSAGES)])
    expected = tokenizer.encode("<user>hé", add_special_tokens=False)
    assert chat.values()["input_ids"].tolist() == [expected]
    assert chat.values()["max_model_len"].tolist() == [[FACTS.max_model_len]]
    for is_plain in (True, False):
        (answer,) = model.execute([request_of(has_rows=True, text_input="ab", add_special_tokens=is_plain)])
        assert answer.values()["input_ids"].tolist() == [tokenizer.encode("ab", add_special_tokens=is_plain)]
        assert "tokenizer_info" not in answer.values()
    (answer,) = model.execute([request_of(has_rows=True, text_input="ab", return_tokenizer_info=True)])
    info = json.loads(answer.values()["tokenizer_info"][0][0])
    assert info["chat_template"] == template.source
    assert (info["model_max_length"], info["vocab_size"]) == (FACTS.max_model_len, tokenizer.vocab_size)
    assert {name: info[name] for name in tokenizer.named_tokens} == tokenizer.named_tokens
    model.finalize()
