# SPDX-License-Identifier: Apache-2.0
"""The Triton models over a fake server and a core driven by hand: what is submitted, and what is sent when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import pb_utils
from fakes.core_client import FACTS, FakeCoreClient
from fakes.tiny_tokenizers import byte_level
from wavetrain_engine.config import EngineConfig
from wavetrain_engine.errors import ErrorCode
from wavetrain_engine.request import FinishReason, RequestStats, TokenLogprobs
from wavetrain_engine.serving.contracts import DETOKENIZER_SPAN
from wavetrain_engine.serving.detokenizer_server import DetokenizerServer
from wavetrain_engine.serving.engine_server import EngineServer
from wavetrain_engine.serving.llm_server import LlmServer
from wavetrain_engine.serving.tokenizer_server import TokenizerServer
from wavetrain_engine.serving.triton_model import TritonModel
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.tokenizer import Tokenizer

_TIMEOUT_S = 10.0


class FakeFiles:
    """What a model's `start` asks for."""

    def __init__(self, tokenizer: Tokenizer, client: FakeCoreClient, **flags: Any) -> None:
        self._tokenizer, self._client = tokenizer, client
        self.model_name = "tried"
        self.config = EngineConfig.from_flags(flags)

    def load_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    require_tokenizer = load_tokenizer

    def load_chat_template(self, tokenizer: Tokenizer, *, timeout_s: float) -> ChatTemplate | None:
        return None

    def core_client(self, command: Sequence[str]) -> FakeCoreClient:
        return self._client


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("tokenizer"), vocab_size=400))


@pytest.fixture
def client() -> FakeCoreClient:
    return FakeCoreClient()


def started(kind: type[TritonModel], tokenizer: Tokenizer, client: FakeCoreClient) -> Iterator[Any]:
    model = kind()
    model.start(FakeFiles(tokenizer, client))  # type: ignore[arg-type]
    yield model
    model.finalize()


@pytest.fixture
def llm(tokenizer: Tokenizer, client: FakeCoreClient) -> Iterator[LlmServer]:
    yield from started(LlmServer, tokenizer, client)


@pytest.fixture
def engine(tokenizer: Tokenizer, client: FakeCoreClient) -> Iterator[EngineServer]:
    yield from started(EngineServer, tokenizer, client)


def strings(*texts: str) -> np.ndarray[Any, Any]:
    return np.array([text.encode() for text in texts], dtype=np.object_)


def array_of(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str):
        return strings(value)
    return np.array([value], dtype=np.bool_ if isinstance(value, bool) else np.int32)


def llm_request(text: str = "def f", *, request_id: str = "", parameters: Any = None, **inputs: Any) -> Any:
    arrays = {"text_input": strings(text), **{name: array_of(value) for name, value in inputs.items()}}
    return pb_utils.InferenceRequest(arrays, request_id=request_id, parameters=parameters)


def engine_request(rows: list[list[int]], *, outputs: list[str] | None = None, **scalars: Any) -> Any:
    width = max(map(len, rows))
    inputs: dict[str, Any] = {
        "input_ids": np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int32),
        "input_lengths": np.array([len(row) for row in rows], dtype=np.int32),
        "request_output_len": np.full(len(rows), 8, dtype=np.int32),
    }
    inputs |= {name: np.array([value] * len(rows)) for name, value in scalars.items()}
    return pb_utils.InferenceRequest(inputs, outputs=outputs)


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def finish(request: Any) -> list[Any]:
    assert request.sender.is_final.wait(_TIMEOUT_S)
    return request.sender.responses


def error_of(request: Any) -> str:
    (response,) = finish(request)
    return response.error().message()


def texts(responses: list[Any]) -> list[str]:
    return [b"".join(response.values()["text_output"]).decode() for response in responses]


def test_stream_sends_new_text_and_the_final_flag_with_the_last(
    llm: LlmServer, client: FakeCoreClient, tokenizer: Tokenizer
) -> None:
    request = llm_request(max_tokens=8, stream=True)
    llm.execute([request])
    ids = tokenizer.encode("hé wörld", add_special_tokens=False)
    for token_id in ids[:-1]:
        num_sent = len(request.sender.responses)
        client.send(0, [token_id])
        if tokenizer.decode([token_id]).isascii():
            wait_for(lambda num_sent=num_sent: len(request.sender.responses) > num_sent)
    client.send(0, ids[-1:], FinishReason.LENGTH)
    responses = finish(request)
    assert len(responses) > 1
    assert "".join(texts(responses)) == "hé wörld"


def test_what_piles_up_while_sending_leaves_in_one_response(
    llm: LlmServer, client: FakeCoreClient, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = llm_request(max_tokens=8, stream=True, return_num_output_tokens=True)
    gate, send = threading.Event(), request.sender.send

    def slow_send(*args: Any, **kwargs: Any) -> None:
        gate.wait(_TIMEOUT_S)
        send(*args, **kwargs)

    monkeypatch.setattr(request.sender, "send", slow_send)
    llm.execute([request])
    ids = tokenizer.encode("abcdefgh", add_special_tokens=False)
    for token_id in ids[:-1]:
        client.send(0, [token_id])
    client.send(0, ids[-1:], FinishReason.LENGTH)
    gate.set()
    responses = finish(request)
    assert len(responses) <= 2  # the one that was being sent, and the rest
    assert "".join(texts(responses)) == "abcdefgh"
    assert sum(int(response.values()["num_output_tokens"].sum()) for response in responses) == len(ids)


def test_stop_word_reaches_the_core_before_the_pace_lets_its_text_go(
    tokenizer: Tokenizer, client: FakeCoreClient
) -> None:
    model = LlmServer()
    model.start(FakeFiles(tokenizer, client, stream_interval=1000))  # type: ignore[arg-type]
    request = llm_request(max_tokens=64, stream=True, stop_words=strings("STOP"))
    model.execute([request])
    for token_id in tokenizer.encode("abc STOP", add_special_tokens=False):
        client.send(0, [token_id])
    responses = finish(request)
    assert len(responses) <= 2
    assert "".join(texts(responses)) == "abc "
    assert client.cancelled == [client.requests[0].request_id]
    model.finalize()


def test_stream_interval_is_the_least_number_of_tokens_in_a_response(
    tokenizer: Tokenizer, client: FakeCoreClient
) -> None:
    model = LlmServer()
    model.start(FakeFiles(tokenizer, client, stream_interval=3))  # type: ignore[arg-type]
    request = llm_request(max_tokens=8, stream=True, return_num_output_tokens=True)
    model.execute([request])
    ids = tokenizer.encode("abcdefgh", add_special_tokens=False)
    for token_id in ids[:-1]:
        client.send(0, [token_id])
        wait_for(lambda: request.sender.responses)
    client.send(0, ids[-1:], FinishReason.LENGTH)
    counts = [int(response.values()["num_output_tokens"].sum()) for response in finish(request)]
    assert counts[0] == 1
    assert all(count >= 3 for count in counts[1:-1])
    assert (sum(counts), "".join(texts(request.sender.responses))) == (len(ids), "abcdefgh")
    model.finalize()


def test_text_before_a_failure_is_sent_before_it(tokenizer: Tokenizer, client: FakeCoreClient) -> None:
    model = LlmServer()
    model.start(FakeFiles(tokenizer, client, stream_interval=1000))  # type: ignore[arg-type]
    request = llm_request(max_tokens=8, stream=True)
    model.execute([request])
    for token_id in tokenizer.encode("abcd", add_special_tokens=False):
        client.send(0, [token_id])
    client.send(0, [], FinishReason.ERROR, error_code=ErrorCode.DEADLINE, error="timeout_ms has passed")
    *told, last = finish(request)
    assert "".join(texts(told)) == "abcd"
    assert last.error().message() == "deadline: timeout_ms has passed"
    assert client.cancelled == []
    model.finalize()


def test_whole_answer_has_the_prompt_as_each_dialect_says(
    llm: LlmServer, client: FakeCoreClient, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("xyz", add_special_tokens=False)
    for index, (inputs, expected) in enumerate(
        [
            ({"max_tokens": 4}, "def fxyz"),
            ({"max_tokens": 4, "exclude_input_in_output": True}, "xyz"),
            ({}, "def fxyz"),
            ({"exclude_input_in_output": True}, "xyz"),
        ]
    ):
        request = llm_request(**inputs)
        llm.execute([request])
        client.send(index, ids[:1])
        client.send(index, ids[1:], FinishReason.LENGTH)
        assert texts(finish(request)) == [expected]


def test_defaults_follow_the_dialect(llm: LlmServer, client: FakeCoreClient) -> None:
    llm.execute(
        [
            llm_request(max_tokens=4),
            llm_request(max_tokens=4, temperature=np.array([0.5], dtype=np.float32), top_k=0),
            llm_request(),
            llm_request(sampling_parameters='{"max_tokens": "3", "bad_words": ["x"]}'),
            llm_request(parameters={"min_p": 0.5, "cache_salt": "s", "request_priority": 3}),
            llm_request(max_tokens=4, sampling_parameters='{"min_p": 0.25}'),
        ]
    )
    legacy, sampled, vllm, json_text, plain, both = (request.sampling_params for request in client.requests)
    assert legacy.is_greedy
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.5, 0, 1.0)
    assert (vllm.temperature, vllm.top_p, vllm.max_tokens) == (0.6, 0.9, 16)
    assert (json_text.max_tokens, json_text.temperature) == (3, 0.6)
    assert json_text.bad_words == []
    assert json_text.bad_words_token_ids
    assert plain.min_p == 0.5
    assert (client.requests[4].cache_salt, client.requests[4].priority) == ("s", 3)
    assert (both.min_p, both.is_greedy, both.max_tokens) == (0.25, True, 4)


def test_stop_word_cuts_the_text_and_ends_the_request_in_the_core(
    llm: LlmServer, client: FakeCoreClient, tokenizer: Tokenizer
) -> None:
    request = llm_request(max_tokens=64, stream=True, stop_words=strings("STOP"), return_finish_reason=True)
    llm.execute([request])
    for token_id in tokenizer.encode("abc ST no STOP never", add_special_tokens=False):
        if request.sender.is_final.is_set() or client.cancelled:
            break
        client.send(0, [token_id])
        time.sleep(0.002)
    responses = finish(request)
    assert "".join(texts(responses)) == "abc ST no "
    assert responses[-1].values()["finish_reason"].tolist() == [b"stop"]
    assert client.cancelled == [client.requests[0].request_id]


def test_client_that_gives_up_ends_the_request(llm: LlmServer, client: FakeCoreClient) -> None:
    request = llm_request(max_tokens=64, stream=True)
    llm.execute([request])
    request.sender.is_given_up = True
    finish(request)
    assert client.cancelled == [client.requests[0].request_id]


def test_requests_without_a_core_are_refused_at_once(tokenizer: Tokenizer) -> None:
    model = LlmServer()
    model.start(FakeFiles(tokenizer, FakeCoreClient(is_alive=False)))  # type: ignore[arg-type]
    request = llm_request(max_tokens=4)
    model.execute([request])
    assert error_of(request) == "dead: the engine core is restarting; try again"
    assert not model.is_ready()
    model.finalize()


def test_failed_sequence_ends_its_whole_request_with_one_error(llm: LlmServer, client: FakeCoreClient) -> None:
    request = llm_request(max_tokens=8, num_return_sequences=3)
    llm.execute([request])
    client.send(1, [], FinishReason.ERROR, error_code=ErrorCode.INTERNAL, error="NaN logits")
    assert error_of(request) == "internal: NaN logits"
    wait_for(lambda: len(client.cancelled) == 2)
    assert set(client.cancelled) == {client.requests[0].request_id, client.requests[2].request_id}


def test_our_bugs_show_nothing_of_ourselves(llm: LlmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(llm._generation, "run", broken)
    request = llm_request(max_tokens=4)
    llm.execute([request])
    assert error_of(request) == "internal: the server failed on this request; its log says why"


def test_stop_ends_all_requests_of_the_id_and_answers_nothing(llm: LlmServer, client: FakeCoreClient) -> None:
    running, other = llm_request(max_tokens=8, request_id="a"), llm_request(max_tokens=8, request_id="b")
    stop = llm_request("", stop=True, request_id="a")
    llm.execute([running, other, stop])
    assert texts(finish(running)) == ["def f"]
    assert finish(stop) == []
    assert client.cancelled == [client.requests[0].request_id]
    assert not other.sender.is_final.is_set()


def test_engine_rows_fan_out_and_end_together(engine: EngineServer, client: FakeCoreClient) -> None:
    request = engine_request([[5, 6, 7], [8]], num_return_sequences=np.int32(2), streaming=True)
    engine.execute([request])
    assert [item.prompt_token_ids for item in client.requests] == [[5, 6, 7], [5, 6, 7], [8], [8]]
    for index in (3, 1, 0):
        client.send(index, [100 + index], FinishReason.LENGTH)
    wait_for(lambda: len(request.sender.responses) == 3)
    assert not request.sender.is_final.is_set()
    client.send(2, [102], FinishReason.LENGTH)
    found = {
        (response.values()["batch_index"].item(), response.values()["sequence_index"].item()): response.values()[
            "output_ids"
        ].tolist()
        for response in finish(request)
    }
    assert found == {(0, 0): [[[100]]], (0, 1): [[[101]]], (1, 0): [[[102]]], (1, 1): [[[103]]]}


def test_without_streaming_several_sequences_are_one_response(
    llm: LlmServer, client: FakeCoreClient, tokenizer: Tokenizer
) -> None:
    wishes = {"return_finish_reason": True, "return_num_output_tokens": True, "return_log_probs": True}
    request = llm_request(max_tokens=8, num_return_sequences=3, exclude_input_in_output=True, **wishes)
    llm.execute([request])
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "bcd", "ef")]
    for index in (2, 0, 1):
        assert not request.sender.responses
        entries = [TokenLogprobs([token_id], [-0.5], [1]) for token_id in words[index]]
        reason = FinishReason.STOP if index == 2 else FinishReason.LENGTH
        ids = [*words[index], 0] if index == 2 else words[index]  # an end token has no text
        entries += entries[:1] if index == 2 else []
        client.send(index, ids, reason, logprobs=entries)
    (response,) = finish(request)
    values = response.values()
    assert values["text_output"].tolist() == [b"a", b"bcd", b"ef"]
    assert values["finish_reason"].tolist() == [b"length", b"length", b"stop"]
    counts = [len(words[0]), len(words[1]), len(words[2]) + 1]
    assert values["num_output_tokens"].tolist() == counts
    assert values["cum_log_probs"].tolist() == [-0.5 * count for count in counts]
    assert values["output_log_probs"].shape == (3, max(counts))
    assert values["output_log_probs"].sum(axis=1).tolist() == values["cum_log_probs"].tolist()
    assert "sequence_index" not in values


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stop", "client-gives-up"])
def test_several_sequences_ended_early_are_one_response_too(
    llm: LlmServer, client: FakeCoreClient, is_stopped: bool
) -> None:
    wishes = {"return_finish_reason": True, "exclude_input_in_output": True}
    request = llm_request(max_tokens=8, num_return_sequences=2, request_id="several", **wishes)
    llm.execute([request])
    client.send(0, [40], FinishReason.LENGTH)
    client.send(1, [41])
    if is_stopped:
        llm.execute([llm_request("", stop=True, request_id="several")])
    else:
        request.sender.is_given_up = True
    (response,) = finish(request)
    assert response.values()["finish_reason"].tolist() == [b"length", b"cancelled"]
    assert len(response.values()["text_output"]) == 2


def test_engine_answers_a_batch_without_streaming_once(engine: EngineServer, client: FakeCoreClient) -> None:
    wishes = {"return_perf_metrics": True, "return_num_output_tokens": True, "return_num_input_tokens": True}
    request = engine_request(
        [[5, 6, 7], [8]], num_return_sequences=np.int32(2), exclude_input_in_output=True, pad_id=np.int32(9), **wishes
    )
    engine.execute([request])
    for index in (3, 1, 0, 2):
        assert not request.sender.responses
        stats = RequestStats(arrival_time_ns=100 + index, last_token_time_ns=200 + index, num_new_blocks=index)
        client.send(index, [100 + index] * (index + 1), FinishReason.LENGTH, stats=stats)
    (response,) = finish(request)
    values = {name: value.tolist() for name, value in response.values().items()}
    assert values["output_ids"] == [
        [[100, 9, 9, 9], [101, 101, 9, 9]],
        [[102, 102, 102, 9], [103, 103, 103, 103]],
    ]
    assert values["sequence_length"] == [[1, 2], [3, 4]]
    assert values["batch_index"] == [[0], [1]]
    assert "sequence_index" not in values
    # What the contract has once per row is about the row's sequences together.
    assert (values["num_input_tokens"], values["num_output_tokens"]) == ([[3], [1]], [[3], [7]])
    assert (values["arrival_time_ns"], values["last_token_time_ns"]) == ([[100], [102]], [[201], [203]])
    assert values["kv_cache_alloc_new_blocks"] == [[1], [5]]


@pytest.mark.parametrize("tensor", ["exclude_input_in_output", "return_log_probs", "num_return_sequences"])
def test_rows_that_have_no_common_response_are_refused(
    engine: EngineServer, client: FakeCoreClient, tensor: str
) -> None:
    dtype = np.int32 if tensor == "num_return_sequences" else np.bool_
    different = engine_request([[5], [6]], **{tensor: dtype(1)})
    different._inputs[-1] = pb_utils.Tensor(tensor, np.array([1, 2 if dtype is np.int32 else 0], dtype=dtype))
    engine.execute([different])
    assert error_of(different).startswith(f"invalid: {tensor} must be the same for all rows of a batch")
    assert not client.requests


def test_several_sequences_and_rows_pass_through_the_ensemble_s_steps(
    engine: EngineServer, client: FakeCoreClient, tokenizer: Tokenizer
) -> None:
    last = DetokenizerServer()
    last.start(FakeFiles(tokenizer, client))  # type: ignore[arg-type]
    prompts = [tokenizer.encode(text) for text in ("naïve 日本語", "x")]
    outputs = ["é", "wörld", "", "😀 d"]
    for excludes in (True, False):
        request = engine_request(
            prompts, outputs=[DETOKENIZER_SPAN], num_return_sequences=np.int32(2), exclude_input_in_output=excludes
        )
        first = len(client.requests)
        engine.execute([request])
        for index, text in enumerate(outputs):
            ids = tokenizer.encode(text, add_special_tokens=False)
            client.send(first + index, [*ids, 0], FinishReason.STOP)
        (response,) = finish(request)
        values = response.values()
        inputs = {
            "tail_ids": values["detokenizer_tail_ids"],
            "token_ids": values["detokenizer_token_ids"],
            "span": values[DETOKENIZER_SPAN],
        }
        (answer,) = last.execute([pb_utils.InferenceRequest(inputs)])
        texts = [[text.decode() for text in row] for row in answer.values()["text_output"].tolist()]
        before = ["", ""] if excludes else ["naïve 日本語", "x"]
        assert texts == [[before[0] + text for text in outputs[:2]], [before[1] + text for text in outputs[2:]]]


def test_engine_stop_words_come_as_ids_or_text(
    engine: EngineServer, client: FakeCoreClient, tokenizer: Tokenizer
) -> None:
    word = tokenizer.encode("two words", add_special_tokens=False)
    special = tokenizer.encode("</s>", add_special_tokens=False)
    ids = [*word, *special]
    ends = [len(word), len(ids)] + [-1] * (len(ids) - 2)
    engine.execute([engine_request([[5]], stop_words_list=[ids, ends], end_id=np.int32(9))])
    params = client.requests[0].sampling_params
    assert params.stop == ["two words"]
    # end_id replaces the model's own; a special token has no text to match, so it stops by its id.
    assert (params.stop_token_ids, params.ignore_eos) == ([9, *special], True)


def test_engine_gives_the_detokenizer_s_inputs_to_ensembles_only(engine: EngineServer, client: FakeCoreClient) -> None:
    plain = engine_request([[5]], outputs=["output_ids", DETOKENIZER_SPAN, "context_phase_params"])
    ensemble = engine_request([[5]], outputs=[DETOKENIZER_SPAN])
    engine.execute([plain, ensemble])
    for index in range(2):
        client.send(index, [100], FinishReason.LENGTH)
    assert DETOKENIZER_SPAN not in finish(plain)[0].values()
    assert DETOKENIZER_SPAN in finish(ensemble)[0].values()


def test_log_probs_are_those_of_the_tokens_sent(engine: EngineServer, client: FakeCoreClient) -> None:
    request = engine_request([[5]], return_log_probs=True, exclude_input_in_output=True)
    engine.execute([request])
    assert client.requests[0].sampling_params.logprobs == 0
    entries = [TokenLogprobs([7], [-0.5], [1]), TokenLogprobs([8], [-1.0], [3])]
    client.send(0, [7, 8], FinishReason.LENGTH, logprobs=entries)
    values = finish(request)[0].values()
    assert values["output_log_probs"].tolist() == [[[-0.5, -1.0]]]
    assert values["cum_log_probs"].tolist() == [[-1.5]]


def test_tokenizer_and_detokenizer_are_inverse(tokenizer: Tokenizer, client: FakeCoreClient) -> None:
    first, last = TokenizerServer(), DetokenizerServer()
    first.start(FakeFiles(tokenizer, client))  # type: ignore[arg-type]
    last.start(FakeFiles(tokenizer, client))  # type: ignore[arg-type]
    prompts = ["naïve 日本語", "x"]
    inputs = {
        "text_input": np.array([[prompt.encode()] for prompt in prompts], dtype=np.object_),
        "bad_words": np.array([[b"evil", b"word"], [b"", b""]], dtype=np.object_),
        "embedding_bias_words": np.array([[b"x"], [b""]], dtype=np.object_),
        "embedding_bias_weights": np.array([[2.0], [0.0]], dtype=np.float32),
    }
    (response,) = first.execute([pb_utils.InferenceRequest(inputs)])
    values = response.values()
    assert values["embedding_bias"].shape == (2, FACTS.vocab_size)
    assert values["embedding_bias"].sum() == 2.0
    assert values["bad_words_list"].shape[:2] == (2, 2)
    assert values["bad_words_list"][1, 1].tolist() == [-1] * values["bad_words_list"].shape[2]
    for row, prompt in enumerate(prompts):
        ids = values["input_ids"][row : row + 1, : values["input_lengths"][row, 0]]
        (answer,) = last.execute([pb_utils.InferenceRequest({"token_ids": ids})])
        assert answer.values()["text_output"].tolist() == [[prompt.encode()]]
    first.finalize()


def test_detokenizer_never_fails(tokenizer: Tokenizer, client: FakeCoreClient) -> None:
    model = DetokenizerServer()
    model.start(FakeFiles(tokenizer, client))  # type: ignore[arg-type]
    for ids in ([[-1, 2**31 - 1]], [[]], [[9999]]):
        (response,) = model.execute([pb_utils.InferenceRequest({"token_ids": np.array(ids, dtype=np.int32)})])
        assert response.error() is None
        assert response.values()["text_output"].shape == (1, 1)


def test_start_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "engine.toml").write_text("[model]\nmodle = 'x'\n", encoding="utf-8")
    arguments = {
        "model_name": "llm",
        "model_repository": str(tmp_path),
        "model_config": '{"parameters": {"engine_config": {"string_value": "engine.toml"}}}',
    }
    with pytest.raises(pb_utils.TritonModelException, match=r"^invalid: unknown key .* did you mean model\.model\?$"):
        LlmServer().initialize(arguments)


def test_environment_that_means_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVETRAIN_LOG_LEVEL", "loud")
    with pytest.raises(pb_utils.TritonModelException, match=r"^invalid: WAVETRAIN_LOG_LEVEL: expected one of debug, "):
        LlmServer().initialize({"model_name": "llm"})
