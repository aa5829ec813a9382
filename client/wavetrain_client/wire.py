# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of the Triton models as protobuf messages: pure functions, no I/O.

Three dialects, told apart by the model's name:
    llm        vLLM's: text_input, one JSON object with the sampling parameters; no batch dimension
    ensemble   the legacy inflight_batcher_llm contract: one tensor per parameter, shapes [1, k]
    engine     the legacy tensorrt_llm contract: token ids in, token ids out, shapes [1, k]
Any other model is spoken to in the llm dialect. Decoding goes by the outputs' names, so it serves all three.

The Triton server takes the gRPC parameter `priority` for its own queues and does not show it to a model, so ours
travels as `request_priority`. `timeout_ms`, `cache_salt` and `traceparent` pass through under their own names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from wavetrain_client.chunk import Chunk, FinishReason, Logprob, PerfMetrics
from wavetrain_client.errors import RequestRejected, ServerFailed
from wavetrain_client.options import ChatPrompt, GenerationRequest, Prompt
from wavetrain_client.tensor import Tensor, decode_values, encode_tensor

ENSEMBLE_MODEL = "ensemble"
ENGINE_MODEL = "engine"

# The legacy contracts require a length; vLLM's default, so that all models answer alike.
DEFAULT_MAX_TOKENS = 16

# Option → (tensor, data type). Each is one scalar per request.
_ENSEMBLE_SCALARS: dict[str, tuple[str, str]] = {
    "n": ("num_return_sequences", "INT32"),
    "max_tokens": ("max_tokens", "INT32"),
    "min_tokens": ("min_tokens", "INT32"),
    "temperature": ("temperature", "FP32"),
    "top_k": ("top_k", "INT32"),
    "top_p": ("top_p", "FP32"),
    "repetition_penalty": ("repetition_penalty", "FP32"),
    "presence_penalty": ("presence_penalty", "FP32"),
    "frequency_penalty": ("frequency_penalty", "FP32"),
    "seed": ("seed", "UINT64"),
    "return_perf_metrics": ("return_perf_metrics", "BOOL"),
}
_ENGINE_SCALARS: dict[str, tuple[str, str]] = {
    **_ENSEMBLE_SCALARS,
    "max_tokens": ("request_output_len", "INT32"),
    "top_k": ("runtime_top_k", "INT32"),
    "top_p": ("runtime_top_p", "FP32"),
}
# Handled one by one below.
_ENSEMBLE_OTHERS = {"stop", "bad_words", "logprobs", "echo", "ignore_eos"}
_ENGINE_OTHERS = {"stop_token_ids", "bad_words_token_ids", "logprobs", "echo", "ignore_eos"}
# Not part of llm's JSON object: they have tensors of their own.
_LLM_TENSORS = {"echo", "return_perf_metrics"}

# Outputs that decoding looks at; others (logits, batch_index) are left alone.
_READ_OUTPUTS = {
    "text_output",
    "finish_reason",
    "output_ids",
    "sequence_length",
    "sequence_index",
    "num_input_tokens",
    "num_output_tokens",
    "logprobs",
    "prompt_logprobs",
    "cumulative_logprob",
    "cum_log_probs",
    "output_log_probs",
    *PerfMetrics.__dataclass_fields__,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRequest:
    """What is sent for one request: its tensors, and the request parameters."""

    model: str
    id: str
    tensors: Sequence[Tensor]
    parameters: Mapping[str, int | str] = field(default_factory=dict[str, "int | str"])


def encode_request(request: GenerationRequest, *, timeout_s: float | None = None) -> WireRequest:
    """Builds what a generation sends.

    Args:
        request: what to generate.
        timeout_s: what is left of the request's time, sent along so that the engine stops too.

    Raises:
        RequestRejected: the model's contract cannot carry the prompt or an option.
    """
    if request.model == ENSEMBLE_MODEL:
        tensors = _ensemble_tensors(request)
    elif request.model == ENGINE_MODEL:
        tensors = _engine_tensors(request)
    else:
        tensors = _llm_tensors(request)
    parameters: dict[str, int | str] = {}
    if request.priority is not None:
        parameters["request_priority"] = request.priority
    if timeout_s is not None:
        parameters["timeout_ms"] = max(1, round(timeout_s * 1000))
    if request.cache_salt is not None:
        parameters["cache_salt"] = request.cache_salt
    if request.traceparent is not None:
        parameters["traceparent"] = request.traceparent
    return WireRequest(model=request.model, id=request.id, tensors=tensors, parameters=parameters)


def encode_stop(request_id: str) -> WireRequest:
    """Builds what ends the request of this id, sent to the engine by whatever model it came in."""
    tensors = [
        encode_tensor("stop", "BOOL", (1, 1), [True]),
        encode_tensor("input_lengths", "INT32", (1, 1), [0]),
        encode_tensor("request_output_len", "INT32", (1, 1), [0]),
    ]
    return WireRequest(model=ENGINE_MODEL, id=request_id, tensors=tensors)


def decode_response(response: Any) -> list[Chunk]:
    """Reads the ModelInferResponse of one response: a chunk for each sequence it has news of.

    Raises:
        ServerFailed: an output does not fit its type or its name's meaning.
    """
    outputs = _read_outputs(response)
    texts = [_decode_text(value) for value in outputs.get("text_output", [])]
    rows = _read_token_ids(response, outputs)
    num_sequences = max(len(texts), len(rows))
    if num_sequences == 0:
        return []
    first_index = int(outputs["sequence_index"][0]) if num_sequences == 1 and outputs.get("sequence_index") else 0
    counts = outputs.get("num_output_tokens", [])
    reasons = outputs.get("finish_reason", [])
    logprobs = outputs.get("logprobs", [])
    cumulative = outputs.get("cumulative_logprob") or outputs.get("cum_log_probs") or []
    token_logprobs = _split_rows(outputs.get("output_log_probs"), num_sequences)
    perf_metrics = _read_perf_metrics(outputs)
    num_input_tokens = outputs.get("num_input_tokens")
    prompt_logprobs = _read_logprobs(outputs["prompt_logprobs"][0]) if outputs.get("prompt_logprobs") else None
    return [
        Chunk(
            text=texts[row] if row < len(texts) else "",
            token_ids=rows[row] if row < len(rows) else (),
            finish_reason=_read_finish_reason(reasons[row]) if row < len(reasons) else None,
            sequence_index=first_index + row,
            num_input_tokens=int(num_input_tokens[0]) if num_input_tokens else None,
            num_output_tokens=_count_tokens(counts, num_sequences, rows, row),
            logprobs=_read_logprobs(logprobs[row]) if row < len(logprobs) else None,
            token_logprobs=token_logprobs[row] if row < len(token_logprobs) else None,
            cumulative_logprob=float(cumulative[row]) if row < len(cumulative) else None,
            perf_metrics=perf_metrics,
            prompt_logprobs=prompt_logprobs if row == 0 else None,
        )
        for row in range(num_sequences)
    ]


def _llm_tensors(request: GenerationRequest) -> list[Tensor]:
    given = request.given
    sampling = {name: _plain(value) for name, value in given.items() if name not in _LLM_TENSORS}
    try:
        sampling_json = json.dumps(sampling)
    except (TypeError, ValueError):
        raise RequestRejected("the sampling options must be plain numbers, strings, lists and dicts") from None
    tensors = [
        *_llm_prompt(request.prompt),
        encode_tensor("stream", "BOOL", (1,), [request.is_streaming]),
        encode_tensor("sampling_parameters", "BYTES", (1,), [sampling_json]),
        encode_tensor("exclude_input_in_output", "BOOL", (1,), [not given.get("echo", False)]),
    ]
    flags = ["return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"]
    if "logprobs" in given:
        flags += ["return_logprobs", "return_cumulative_logprob"]
    if given.get("return_perf_metrics"):
        flags.append("return_perf_metrics")
    return tensors + [encode_tensor(flag, "BOOL", (1,), [True]) for flag in flags]


def _llm_prompt(prompt: Prompt) -> list[Tensor]:
    """The prompt in one of its three forms; text_input is required, so beside the others it is empty."""
    if isinstance(prompt, str):
        return [encode_tensor("text_input", "BYTES", (1,), [prompt])]
    empty = encode_tensor("text_input", "BYTES", (1,), [""])
    if isinstance(prompt, ChatPrompt):
        messages, variables = prompt.to_json()
        return [
            empty,
            encode_tensor("messages", "BYTES", (1,), [messages]),
            encode_tensor("template_variables", "BYTES", (1,), [variables]),
        ]
    return [empty, encode_tensor("input_ids", "INT32", (len(prompt),), prompt)]


def _ensemble_tensors(request: GenerationRequest) -> list[Tensor]:
    given = _legacy_options(request, _ENSEMBLE_SCALARS, _ENSEMBLE_OTHERS)
    tensors = [
        encode_tensor("text_input", "BYTES", (1, 1), [_text_prompt(request)]),
        encode_tensor("stream", "BOOL", (1, 1), [_is_streamed(request, given)]),
        *_legacy_tensors(given, _ENSEMBLE_SCALARS),
    ]
    for name, tensor_name in (("stop", "stop_words"), ("bad_words", "bad_words")):
        words = given.get(name, [])
        words = [words] if isinstance(words, str) else list(words)
        if words:
            tensors.append(encode_tensor(tensor_name, "BYTES", (1, len(words)), words))
    return tensors


def _engine_tensors(request: GenerationRequest) -> list[Tensor]:
    if isinstance(request.prompt, (str, ChatPrompt)):
        raise RequestRejected(f"the model {ENGINE_MODEL!r} takes token ids; send text and messages to 'llm'")
    given = _legacy_options(request, _ENGINE_SCALARS, _ENGINE_OTHERS)
    num_tokens = len(request.prompt)
    tensors = [
        encode_tensor("input_ids", "INT32", (1, num_tokens), request.prompt),
        encode_tensor("input_lengths", "INT32", (1, 1), [num_tokens]),
        encode_tensor("streaming", "BOOL", (1, 1), [_is_streamed(request, given)]),
        *_legacy_tensors(given, _ENGINE_SCALARS),
    ]
    stop_token_ids = [[token_id] for token_id in given.get("stop_token_ids", [])]
    for name, sequences in (
        ("stop_words_list", stop_token_ids),
        ("bad_words_list", list(given.get("bad_words_token_ids", []))),
    ):
        if sequences:
            tensors.append(_word_list(name, sequences))
    return tensors


def _legacy_options(
    request: GenerationRequest, scalars: Mapping[str, tuple[str, str]], others: set[str]
) -> dict[str, Any]:
    given = {"max_tokens": DEFAULT_MAX_TOKENS, **request.given}
    for name in given:
        if name not in scalars and name not in others:
            raise RequestRejected(f"{name} cannot be sent to the model {request.model!r}; use the model 'llm'")
    if given.get("logprobs"):
        raise RequestRejected(
            f"the model {request.model!r} gives the sampled token's log-probability only: use logprobs=0, or 'llm'"
        )
    return given


def _is_streamed(request: GenerationRequest, given: Mapping[str, Any]) -> bool:
    """Several sequences are always streamed: in one response they would share one number of tokens, from which the
    reason of each one's end could not be told.
    """
    has_several = given.get("n", 1) != 1
    if has_several and given.get("echo"):
        raise RequestRejected(f"echo with n > 1 cannot be sent to the model {request.model!r}; use the model 'llm'")
    return request.is_streaming or has_several


def _legacy_tensors(given: Mapping[str, Any], scalars: Mapping[str, tuple[str, str]]) -> list[Tensor]:
    tensors = [
        encode_tensor(scalars[name][0], scalars[name][1], (1, 1), [value])
        for name, value in given.items()
        if name in scalars
    ]
    if given.get("ignore_eos"):
        tensors.append(encode_tensor("end_id", "INT32", (1, 1), [-1]))  # no token ends the output
    flags = {
        "exclude_input_in_output": not given.get("echo", False),
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    if "logprobs" in given:
        flags["return_log_probs"] = True
    return tensors + [encode_tensor(name, "BOOL", (1, 1), [flag]) for name, flag in flags.items()]


def _word_list(name: str, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Encodes token sequences as the legacy [1, 2, L]: all ids, then the end offset of each, padded with -1."""
    token_ids = [token_id for sequence in sequences for token_id in sequence]
    ends: list[int] = []
    for sequence in sequences:
        ends.append((ends[-1] if ends else 0) + len(sequence))
    length = max(len(token_ids), len(ends))
    row_ids = token_ids + [0] * (length - len(token_ids))
    row_ends = ends + [-1] * (length - len(ends))
    return encode_tensor(name, "INT32", (1, 2, length), row_ids + row_ends)


def _text_prompt(request: GenerationRequest) -> str:
    if not isinstance(request.prompt, str):
        raise RequestRejected(f"the model {request.model!r} takes text; send token ids and messages to 'llm'")
    return request.prompt


def _plain(value: Any) -> Any:
    """Turns mappings and sequences of any class into dicts and lists, which JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value


def _read_outputs(response: Any) -> dict[str, list[Any]]:
    raw = response.raw_output_contents
    if len(raw) != len(response.outputs):
        raise ServerFailed("the server sent outputs without their raw contents; this client reads only those")
    return {
        output.name: decode_values(output.name, output.datatype, tuple(output.shape), content)
        for output, content in zip(response.outputs, raw, strict=True)
        if output.name in _READ_OUTPUTS
    }


def _read_token_ids(response: Any, outputs: Mapping[str, list[Any]]) -> list[tuple[int, ...]]:
    """Splits output_ids [1, sequences, tokens] into rows, each cut to its sequence_length."""
    if "output_ids" not in outputs:
        return []
    shape = next(tuple(output.shape) for output in response.outputs if output.name == "output_ids")
    width = int(shape[-1])
    values = outputs["output_ids"]
    num_rows = len(values) // width if width else (int(shape[-2]) if len(shape) > 1 else 1)
    lengths = outputs.get("sequence_length") or [width] * num_rows
    return [tuple(values[row * width : row * width + int(lengths[row])]) for row in range(num_rows)]


def _split_rows(values: list[Any] | None, num_rows: int) -> list[tuple[float, ...]]:
    if not values:
        return []
    width = len(values) // num_rows
    return [tuple(values[row * width : (row + 1) * width]) for row in range(num_rows)]


def _count_tokens(counts: Sequence[Any], num_sequences: int, rows: Sequence[tuple[int, ...]], row: int) -> int | None:
    # The legacy contracts have one count for a whole response, which says nothing of each of several sequences.
    if len(counts) == num_sequences:
        return int(counts[row])
    return len(rows[row]) if row < len(rows) else None


def _decode_text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise ServerFailed("the server sent text that is not valid UTF-8") from None


def _read_finish_reason(value: bytes) -> FinishReason | None:
    reason = _decode_text(value)
    if reason in {"", "None", "null"}:
        return None
    if reason not in {"stop", "length", "cancelled", "error"}:
        raise ServerFailed(f"the server sent an unknown finish reason {reason[:32]!r}")
    return cast("FinishReason", reason)


def _read_logprobs(value: bytes) -> tuple[Mapping[int, Logprob], ...] | None:
    """Reads llm's JSON: for each new token an object of token id → {logprob, rank, decoded_token}."""
    try:
        positions = json.loads(value)
        if positions is None:
            return None
        return tuple(
            {
                int(token_id): Logprob(_read_logprob(entry["logprob"]), entry.get("rank"), entry.get("decoded_token"))
                for token_id, entry in position.items()
            }
            for position in positions
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ServerFailed("the server sent logprobs that are not the JSON they should be") from None


def _read_logprob(value: Any) -> float:
    """The first token of a prompt has none: nothing comes before it."""
    return math.nan if value is None else float(value)


def _read_perf_metrics(outputs: Mapping[str, list[Any]]) -> PerfMetrics | None:
    found = {name: outputs[name][0] for name in PerfMetrics.__dataclass_fields__ if outputs.get(name)}
    return PerfMetrics(**found) if found else None
