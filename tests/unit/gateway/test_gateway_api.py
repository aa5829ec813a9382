# SPDX-License-Identifier: Apache-2.0
"""What the gateway answers, on real sockets: bodies, streams, headers, and what it refuses."""

from __future__ import annotations

import json

import pytest

from fakes.gateway import MODEL, TOKENIZER_INFO, events, sampling, serve_gateway
from fakes.triton import ReceivedRequest, reply, tensor_response


def with_logprobs(text: str, ids: list[int], finish: str | None, prompt: list[int] | None = None):
    """A response that tells each token's log-probability, -0.5, and a likelier one's."""

    def entry(token_id: int, rank: int, logprob: float | None) -> dict[str, object]:
        return {"logprob": logprob, "rank": rank, "decoded_token": chr(97 + token_id)}

    positions = [{str(item): entry(item, 2, -0.5), "9": entry(9, 1, -0.25)} for item in ids]
    outputs = {
        "text_output": ("BYTES", [1], [text]),
        "finish_reason": ("BYTES", [1], [finish or ""]),
        "logprobs": ("BYTES", [1], [json.dumps(positions)]),
        "cumulative_logprob": ("FP32", [1], [-0.5 * len(ids)]),
        "num_input_tokens": ("UINT32", [1], [3]),
        "num_output_tokens": ("UINT32", [1], [len(ids)]),
    }
    if prompt is not None:
        first = {str(prompt[0]): entry(prompt[0], 0, None)}
        rest = [{str(item): entry(item, 2, -1.5), "9": entry(9, 1, -0.25)} for item in prompt[1:]]
        outputs["prompt_logprobs"] = ("BYTES", [1], [json.dumps([first, *rest])])
    return tensor_response(**outputs)


async def test_a_completion_is_whole_with_usage_and_headers():
    async with serve_gateway() as gateway:
        answer = await gateway.complete(max_tokens=7, temperature=0.5, top_k=3, stop=["a"], logit_bias={"5": -1})
        body = answer.json()
        assert body["choices"] == [{"index": 0, "text": "one two three", "logprobs": None, "finish_reason": "stop"}]
        assert body["usage"]["prompt_tokens"] == 3
        assert body["usage"]["completion_tokens"] == 3
        assert (body["object"], body["model"]) == ("text_completion", MODEL)
        assert body["id"] == f"cmpl-{answer.headers['x-request-id']}"
        assert answer.headers["openai-processing-ms"].isdigit()
        (request,) = gateway.generations
        assert request.inputs["text_input"] == [b"hi"]
        assert sampling(request) == {
            "max_tokens": 7,
            "temperature": 0.5,
            "top_k": 3,
            "stop": ["a"],
            "logit_bias": {"5": -1},
        }


@pytest.mark.parametrize(
    ("prompt", "texts", "ids"),
    [
        ("a", [b"a"], [None]),
        (["a", "b"], [b"a", b"b"], [None, None]),
        ([5, 6], [b""], [[5, 6]]),
        ([[5, 6], [7]], [b"", b""], [[5, 6], [7]]),
    ],
)
async def test_the_four_forms_of_a_prompt(prompt, texts, ids):
    async with serve_gateway() as gateway:
        body = (await gateway.complete(prompt=prompt)).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
        found = sorted(
            gateway.generations, key=lambda item: str(item.inputs.get("input_ids", item.inputs["text_input"]))
        )
        assert [item.inputs["text_input"] for item in found] == [[text] for text in texts]
        assert [item.inputs.get("input_ids") for item in found] == ids
        assert body["usage"]["prompt_tokens"] == 3 * len(texts)


async def test_a_chat_streams_role_text_reason_usage_and_done():
    async with serve_gateway() as gateway:
        answer = await gateway.chat(stream=True, stream_options={"include_usage": True}, max_completion_tokens=5)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        *chunks, usage, done = events(answer.text)
        assert done == "[DONE]"
        assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 6)
        deltas = [chunk["choices"][0] for chunk in chunks]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(item["delta"].get("content", "") for item in deltas) == "one two three"
        assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "stop")
        assert all(item["finish_reason"] is None for item in deltas[:-1])
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert "usage" not in chunks[0]
        (request,) = gateway.generations
        assert json.loads(request.inputs["messages"][0]) == [{"role": "user", "content": "hi"}]
        assert json.loads(request.inputs["template_variables"][0]) == {"add_generation_prompt": True}


async def test_running_usage_and_a_streamed_completion():
    async with serve_gateway() as gateway:
        answer = await gateway.complete(stream=True, stream_options={"continuous_usage_stats": True})
        *chunks, done = events(answer.text)
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two three"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_messages_become_what_templates_know():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "user", "content": "né", "name": "bob"},
    ]
    async with serve_gateway() as gateway:
        await gateway.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
        (request,) = gateway.generations
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        assert json.loads(request.inputs["messages"][0]) == [
            {"role": "system", "content": "a\nb"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "user", "content": "né", "name": "bob"},
        ]


async def test_echo_with_logprobs_is_what_evaluation_harnesses_read():
    async def script(request: ReceivedRequest):
        yield with_logprobs("d", [3], "length", prompt=request.inputs["input_ids"])

    async with serve_gateway(script) as gateway:
        body = (await gateway.complete(prompt=[[0, 1, 2], [4, 5]], max_tokens=1, logprobs=1, echo=True, seed=1)).json()
        first, second = body["choices"]
        assert (first["text"], second["text"]) == ("abcd", "efd")
        assert first["logprobs"] == {
            "tokens": ["a", "b", "c", "d"],
            "token_logprobs": [None, -1.5, -1.5, -0.5],
            "top_logprobs": [None, {"b": -1.5, "j": -0.25}, {"c": -1.5, "j": -0.25}, {"d": -0.5, "j": -0.25}],
            "text_offset": [0, 1, 2, 3],
        }
        assert {sampling(item)["prompt_logprobs"] for item in gateway.generations} == {1}
        scored = (await gateway.complete(prompt=[0, 1], max_tokens=0, logprobs=0, echo=True)).json()
        (choice,) = scored["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -1.5]
        assert choice["logprobs"]["top_logprobs"] is None
        assert scored["usage"]["completion_tokens"] == 0


async def test_a_stream_echoes_too():
    async def script(request: ReceivedRequest):
        yield with_logprobs("d", [3], None, prompt=[0, 1])
        yield with_logprobs("e", [4], "stop")

    async with serve_gateway(script) as gateway:
        *chunks, _ = events((await gateway.complete(prompt="ab", echo=True, logprobs=0, stream=True)).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abde"
        offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == [0, 1, 2, 3]


async def test_chat_logprobs_have_bytes_and_the_likeliest():
    async def script(request: ReceivedRequest):
        yield with_logprobs("d", [3], "stop")

    async with serve_gateway(script) as gateway:
        body = (await gateway.chat(logprobs=True, top_logprobs=1)).json()
        (entry,) = body["choices"][0]["logprobs"]["content"]
        assert (entry["token"], entry["logprob"], entry["bytes"]) == ("d", -0.5, [100])
        assert [item["token"] for item in entry["top_logprobs"]] == ["j"]
        (request,) = gateway.generations
        assert sampling(request)["logprobs"] == 1


async def test_several_choices_and_the_best_of_more():
    async def script(request: ReceivedRequest):
        n = sampling(request)["n"]
        outputs = {
            "text_output": ("BYTES", [n], [str(index) for index in range(n)]),
            "finish_reason": ("BYTES", [n], ["stop"] * n),
            "cumulative_logprob": ("FP32", [n], [-1.0 - (index != 2) - index / 10 for index in range(n)]),
            "num_input_tokens": ("UINT32", [1], [3]),
            "num_output_tokens": ("UINT32", [n], [1] * n),
        }
        yield tensor_response(**outputs)

    async with serve_gateway(script) as gateway:
        many = (await gateway.complete(n=3)).json()
        assert [(item["index"], item["text"]) for item in many["choices"]] == [(0, "0"), (1, "1"), (2, "2")]
        best = (await gateway.complete(n=2, best_of=4)).json()
        assert [(item["index"], item["text"]) for item in best["choices"]] == [(0, "2"), (1, "0")]
        assert best["usage"]["completion_tokens"] == 4
        streamed = await gateway.chat(n=2, stream=True)
        indices = {chunk["choices"][0]["index"] for chunk in events(streamed.text)[:-1]}
        assert indices == {0, 1}


REFUSED = [
    ({"temprature": 1}, "temprature", "unknown_parameter", "did you mean 'temperature'"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter", "do not fill text in"),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter", "grammar"),
    ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
    ({"n": 17}, "n", "invalid_value", "at most 16"),
    ({"n": True}, "n", "invalid_value", "valid integer"),
    ({"n": 2**70}, "n", "invalid_value", ""),
    ({"temperature": "1"}, "temperature", "invalid_value", "valid number"),
    ({"temperature": 2.5}, "temperature", "invalid_value", "less than or equal to 2"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value", "greater than"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", "0 with echo"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "invalid_value", "lower it"),
    ({"best_of": 1, "n": 2}, "best_of", "invalid_value", "less than n"),
    ({"best_of": 2, "stream": True}, "best_of", "invalid_value", "cannot be streamed"),
    ({"stop": ["x"] * 17}, "stop", "invalid_value", "at most 16"),
    ({"stop": ["x" * 257]}, "stop", "invalid_value", "at most 256"),
    ({"stop": ["x"] * 1000}, "stop", "invalid_value", "at most 64"),
    ({"stop": [""]}, "stop", "invalid_value", "empty"),
    ({"logprobs": 21}, "logprobs", "invalid_value", "at most 20"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value", "between -100 and 100"),
    ({"logit_bias": {"1": True}}, "logit_bias", "invalid_value", "must be a number"),
    ({"logit_bias": {str(item): 1 for item in range(1025)}}, "logit_bias", "invalid_value", "at most 1024"),
    ({"prompt": ""}, "prompt", "invalid_value", "empty"),
    ({"prompt": []}, "prompt", "invalid_value", "none empty"),
    ({"prompt": [[]]}, "prompt", "invalid_value", "empty"),
    ({"prompt": ["a", 1]}, "prompt", "invalid_value", "none empty"),
    ({"prompt": [1, -1]}, "prompt", "invalid_value", "none empty"),
    ({"prompt": ["x"] * 257}, "prompt", "invalid_value", "at most 256"),
    ({"prompt": ["x"] * 200, "n": 2}, "n", "invalid_value", "sequences"),
    ({"prompt": None}, "prompt", "invalid_value", "prompt must be"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "needs stream"),
    ({"model": "other"}, "model", "model_not_found", "no model 'other'"),
    ({"service_tier": "flex"}, "service_tier", "unsupported_value", "auto"),
]


async def test_what_is_refused_is_named():
    async with serve_gateway() as gateway:
        for fields, param, code, words in REFUSED:
            answer = await gateway.complete(**fields)
            error = answer.json()["error"]
            assert answer.status_code == (404 if code == "model_not_found" else 400), fields
            assert (error["param"], error["code"]) == (param, code), (fields, error)
            assert words in error["message"], (fields, error)
            assert error["request_id"] == answer.headers["x-request-id"]
        assert gateway.generations == []


REFUSED_CHATS = [
    ({"tools": [{"type": "function"}]}, "tools", "does not enforce tool calls"),
    ({"tools": [{}], "tool_choice": "auto"}, "tool_choice", "only 'none'"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not constrained"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not constrained"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "role"),
    ({"messages": [{"role": "user"}]}, "messages.0.user.content", "required"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens", "send one"),
    ({"chat_template": "{{ x }}"}, "chat_template", "cannot bring its own"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs.x", ""),
    ({"modalities": ["audio"]}, "modalities", "text only"),
    ({"functions": []}, "functions", "tool calls"),
]


async def test_what_chats_are_refused():
    async with serve_gateway() as gateway:
        for fields, param, words in REFUSED_CHATS:
            answer = await gateway.chat(**fields)
            error = answer.json()["error"]
            assert answer.status_code == 400, fields
            assert str(error["param"]).startswith(param), (fields, error)
            assert words in error["message"], (fields, error)
        for url in ("http://169.254.169.254/", "data:image/png;base64,aGk="):
            parts = [{"type": "image_url", "image_url": {"url": url}}]
            answer = await gateway.chat(parts)
            assert answer.status_code == 400
            assert "content parts of type 'image_url' are not supported" in answer.json()["error"]["message"]
        for content, message in (
            ([{"type": "text", "text": "x"}, {"type": "text"}], "messages.0.user.content.1.text: Field required"),
            (5, "messages.0.user.content: Input should be a valid string"),
        ):
            assert (await gateway.chat(content)).json()["error"]["message"] == message
        assert gateway.generations == []
        neutral = {"tools": [{}], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
        assert (await gateway.chat(**neutral, user="u", service_tier="auto")).status_code == 200


async def test_bodies_that_are_no_json_objects():
    async with serve_gateway(caps={"max_body_bytes": 4096}) as gateway:
        path, json_type = "/v1/completions", {"content-type": "application/json"}
        for data, words in (
            (b"", "not valid JSON"),
            (b"[1]", "must be a JSON object"),
            (b'{"model": NaN}', "not valid JSON"),
            (b'{"model": "\xff"}', "not valid JSON"),
            (b'{"a":' * 600 + b"1" + b"}" * 600, "not valid JSON"),
            (json.dumps({f"k{item}": 1 for item in range(200)}).encode(), "has 200 fields"),
        ):
            answer = await gateway.http.post(path, content=data, headers=json_type)
            assert (answer.status_code, words in answer.text) == (400, True), answer.text
        assert (await gateway.http.post(path, content=b"x" * 4097, headers=json_type)).status_code == 413

        async def chunks():
            for _ in range(5):
                yield b"x" * 1000

        assert (await gateway.http.post(path, content=chunks(), headers=json_type)).status_code == 413
        for headers in ({}, {"content-type": "text/plain"}, json_type | {"content-encoding": "gzip"}):
            assert (await gateway.http.post(path, content=b"{}", headers=headers)).status_code == 415


async def test_routes_that_are_not_there():
    async with serve_gateway() as gateway:
        assert (await gateway.http.get("/v2/models/llm")).json()["error"]["code"] == "unknown_route"
        wrong = await gateway.http.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert (await gateway.http.get("/v1/models/..%2f..%2fetc")).status_code == 404
        assert (await gateway.http.get("/v1/models/nobody")).json()["error"]["code"] == "model_not_found"
        assert (await gateway.http.post("/v1/requests/none/cancel")).json()["error"]["code"] == "request_not_found"


async def test_models_and_tokens():
    async with serve_gateway() as gateway:
        listed = (await gateway.http.get("/v1/models")).json()
        assert [item["id"] for item in listed["data"]] == [MODEL]
        assert (await gateway.http.get(f"/v1/models/{MODEL}")).json()["object"] == "model"
        tokens = await gateway.http.post("/tokenize", json={"model": MODEL, "prompt": "ab"})
        assert tokens.json() == {"count": 2, "max_model_len": 2048, "tokens": [97, 98]}
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        assert (await gateway.http.post("/tokenize", json=chat)).json()["count"] > 10
        text = await gateway.http.post("/detokenize", json={"model": MODEL, "tokens": [0, 1, 2]})
        assert text.json() == {"prompt": "abc"}
        both = await gateway.http.post("/tokenize", json=chat | {"prompt": "x"})
        assert both.json()["error"]["message"] == "send either prompt or messages"


async def test_what_is_about_tokens_needs_a_model_only_where_there_are_several():
    async with serve_gateway() as gateway:
        http = gateway.http
        for query in ("", f"?model={MODEL}"):
            assert (await http.get(f"/tokenizer_info{query}")).json() == TOKENIZER_INFO
        assert (await http.post("/tokenize", json={"prompt": "ab"})).json()["tokens"] == [97, 98]
        assert (await http.post("/detokenize", json={"tokens": [0, 1]})).json() == {"prompt": "ab"}
        for query, status, param in (
            ("?model=other", 404, "model"),
            ("?model=", 404, "model"),
            ("?mode=m", 400, "query"),
        ):
            answer = await http.get(f"/tokenizer_info{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_of_several_models_one_has_to_be_named(tmp_path):
    async with serve_gateway() as only:
        replica = '[[replica]]\nname = "{0}"\nurl = "{1}"\nmodel = "{0}"\n'
        table = "".join(replica.format(name, only.fake.url) for name in "ab")
        (tmp_path / "routing.toml").write_text(table, encoding="utf-8")
        async with serve_gateway(routing={"file": tmp_path / "routing.toml"}) as gateway:
            for answer in (
                await gateway.http.get("/tokenizer_info"),
                await gateway.http.post("/tokenize", json={"prompt": "ab"}),
                await gateway.http.post("/detokenize", json={"tokens": [1]}),
            ):
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (400, "model", "missing_parameter")
            assert (await gateway.http.get("/tokenizer_info?model=b")).json() == TOKENIZER_INFO


async def test_the_request_id_is_the_callers_own():
    async with serve_gateway() as gateway:
        answer = await gateway.http.get("/livez", headers={"x-request-id": "mine.1"})
        assert answer.headers["x-request-id"] == "mine.1"
        for wrong in ("a b", "x" * 129, "ü".encode("latin-1")):
            assert (await gateway.http.get("/livez", headers={"x-request-id": wrong})).status_code == 400


async def test_without_keys_only_loopbacks_names_are_answered():
    async with serve_gateway(listen={"allowed_hosts": ["mine.example"]}) as gateway:
        for host, status in (
            ("localhost:9000", 200),
            ("[::1]:9000", 200),
            ("mine.example", 200),
            ("evil.example", 403),
            ("evil.example:9000", 403),
            ("[", 403),
        ):
            answer = await gateway.http.get("/v1/models", headers={"host": host})
            assert answer.status_code == status, host


async def test_metrics_tell_of_replicas_and_no_model_that_callers_made_up():
    async with serve_gateway() as gateway:
        await gateway.complete()
        for number in range(20):
            await gateway.complete(model=f"made-up-{number}")
        text = (await gateway.http.get("/metrics")).text
        assert "made-up" not in text
        labels = f'key="anonymous",model="{MODEL}",replica="{gateway.fake.url}"'
        assert f"wavetrain_gateway_generation_tokens_total{{{labels}}} 3.0" in text
        assert f'wavetrain_gateway_replica_healthy{{model="{MODEL}"' in text


async def test_salt_priority_and_time_limit_reach_the_replica():
    async with serve_gateway() as gateway:
        body = {"model": MODEL, "prompt": "x", "priority": 3, "cache_salt": "s"}
        answer = await gateway.http.post("/v1/completions", json=body, headers={"x-request-timeout-ms": "5000"})
        assert answer.status_code == 200
        parameters = gateway.generations[0].parameters
        assert (parameters["request_priority"], parameters["cache_salt"]) == (3, "s")
        assert 0 < parameters["timeout_ms"] <= 5000
        headers = {"x-request-timeout-ms": "soon"}
        assert (await gateway.http.post("/v1/completions", json=body, headers=headers)).status_code == 400


BACKEND_ERRORS = [
    ("invalid: top_k must be an integer", 400, "invalid_value", "top_k must be an integer"),
    ("invalid: the prompt has 9 tokens, but max_model_len is 8", 400, "context_length_exceeded", "max_model_len is 8"),
    ("not_found: there is no adapter x", 404, "model_not_found", "no adapter"),
    ("deadline: it took too long", 504, "deadline_exceeded", "within its time"),
    ("internal: CUDA error at /opt/x/y.cu:12", 500, "internal_error", "its log says why"),
    ("invalid: cannot open /dev/shm/triton_python_backend_shm_region_1", 400, "invalid_value", "its log says why"),
]


@pytest.mark.parametrize(("message", "status", "code", "words"), BACKEND_ERRORS)
async def test_backend_errors_have_their_status_and_show_nothing_private(message, status, code, words):
    async def script(request: ReceivedRequest):
        yield message

    async with serve_gateway(script) as gateway:
        for is_streamed in (False, True):
            answer = await gateway.complete(stream=is_streamed)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert words in answer.text
            for private in ("/opt", "shm", "Traceback", gateway.fake.url):
                assert private not in answer.text


async def test_a_silent_sequence_ends_well():
    async def script(request: ReceivedRequest):
        yield reply("", "stop", num_tokens=0)

    async with serve_gateway(script) as gateway:
        assert (await gateway.complete()).json()["choices"][0]["text"] == ""
        *chunks, done = events((await gateway.chat(stream=True)).text)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
        assert done == "[DONE]"
