# SPDX-License-Identifier: Apache-2.0
"""From one row of input tensors to what the engine needs: prompt, sampling parameters, what to send back.

Two dialects share the tensors. The legacy one (TensorRT-LLM's) is greedy unless a sampling input says
otherwise, and its 0 means off for top_k and top_p. vLLM's takes the checkpoint's generation_config and a JSON
object. `llm` speaks both; there the legacy tensor `max_tokens` decides, and whatever the dialect, one quantity
given twice is an error that names both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wavetrain_engine.errors import InvalidSamplingParams, RequestError
from wavetrain_engine.sampling_params import MAX_STOP_STRINGS, SamplingParams
from wavetrain_engine.serving.contracts import Contract
from wavetrain_engine.serving.tensors import RequestTensors
from wavetrain_engine.text.tokenizer import Tokenizer

# No special token's text is longer, so a longer word need not be tokenized to know that it is none.
_MAX_SPECIAL_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """What the caller wants back. `exclude_input` None: as the contract has it by default."""

    stream: bool = False
    stop: bool = False
    exclude_input: bool | None = None
    return_log_probs: bool = False
    return_perf_metrics: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False


@dataclass(slots=True, kw_only=True)
class RowInputs:
    """One row, read through its contract's table.

    Attributes:
        sampling: parameter name to value, from tensors; what is absent or off is left out.
        named_by: parameter name to the tensor that gave it, for messages.
    """

    row: int
    options: RowOptions
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    named_by: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, parameter: str, tensor_name: str, value: Any) -> None:
        """Notes a sampling parameter.

        Raises:
            RequestError: another input gave the same one.
        """
        if parameter in self.sampling:
            raise RequestError(f"{tensor_name} and {self.named_by[parameter]} both give {parameter}; send one of them")
        self.sampling[parameter] = value
        self.named_by[parameter] = tensor_name


def check_inputs(tensors: RequestTensors, contract: Contract) -> None:
    """Refuses a request without a required input.

    Raises:
        RequestError: with the name of what is missing.
    """
    present = set(tensors.names)
    for name in contract.required:
        if name not in present:
            raise RequestError(f"the input {name} is missing; send it with every request")


def read_row(tensors: RequestTensors, contract: Contract, row: int) -> RowInputs:
    """Reads everything of a row but the contract's special inputs.

    Raises:
        RequestError: an input asks for what is not supported, or one quantity is given twice.
    """
    sampling: list[tuple[str, str, Any]] = []
    switches: dict[str, Any] = {}
    for name in tensors.names:
        if name in contract.refused:
            _refuse(name, tensors.row(name, row), contract.refused[name])
        elif name in contract.switches:
            value = tensors.scalar(name, row)
            if value is not None:
                switches[contract.switches[name]] = bool(value)
        elif name in contract.sampling:
            value = tensors.scalar(name, row)
            if value is not None:
                sampling.append((contract.sampling[name], name, value))
        elif name not in contract.special:
            raise RequestError(f"unknown input {name!r}")
    inputs = RowInputs(row=row, options=RowOptions(**switches))
    for parameter, name, value in sampling:
        inputs.add(parameter, name, value)
    return inputs


def legacy_sampling_params(inputs: RowInputs, extra: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters in the legacy dialect; `extra` are those that are no scalar tensor.

    Raises:
        InvalidSamplingParams: a value is out of range.
    """
    values = {**inputs.sampling, **extra}
    is_sampled = "temperature" in values or values.get("top_k", 0) != 0 or values.get("top_p", 0.0) != 0.0
    for name in ("top_k", "top_p"):
        if values.get(name) == 0:
            del values[name]
    if not is_sampled:
        values["temperature"] = 0.0
    if inputs.options.return_log_probs:
        values.setdefault("logprobs", 0)
    return SamplingParams.from_mapping(values)


def vllm_sampling_params(
    inputs: RowInputs, extra: Mapping[str, Any], given: Mapping[str, Any], defaults: SamplingParams
) -> SamplingParams:
    """Sampling parameters in vLLM's dialect.

    Args:
        extra: legacy inputs that are no scalar tensor (stop words and the like).
        given: the JSON object's, or the request parameters'.

    Raises:
        InvalidSamplingParams: a name is unknown, a value out of range.
        RequestError: one quantity was given as a tensor and in `given`.
    """
    tensors = {**inputs.sampling, **extra}
    for name in given:
        canonical = "min_tokens" if name == "min_length" else name
        if canonical in tensors:
            tensor_name = inputs.named_by.get(canonical, canonical)
            raise RequestError(f"the input {tensor_name} and sampling_parameters both give {name}; send one of them")
    # Off in the legacy dialect, where these tensors come from.
    if tensors.get("top_k") == 0:
        del tensors["top_k"]
    if tensors.get("top_p") == 0:
        del tensors["top_p"]
    params = SamplingParams.from_mapping({**tensors, **given}, defaults)
    wants_logprobs = inputs.options.return_cumulative_logprob or inputs.options.return_log_probs
    return params.replace(logprobs=0) if wants_logprobs and params.logprobs is None else params


def end_id_params(end_id: int | None, vocab_size: int) -> dict[str, Any]:
    """TensorRT-LLM's `end_id` replaces the model's own end tokens; -1 leaves none.

    Raises:
        RequestError: it is no token.
    """
    if end_id is None:
        return {}
    if not -1 <= end_id < vocab_size:
        raise RequestError(f"end_id must be a token id below {vocab_size}, or -1 for none, got {end_id}")
    return {"ignore_eos": True} if end_id == -1 else {"ignore_eos": True, "stop_token_ids": [end_id]}


def stop_word_params(words: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Stop words as parameters: a word that is one special token has no text to match, so it stops by its id.

    Raises:
        InvalidSamplingParams: there are too many.
    """
    if len(words) > MAX_STOP_STRINGS:
        raise InvalidSamplingParams(f"there are {len(words)} stop words; at most {MAX_STOP_STRINGS} are allowed")
    strings: list[str] = []
    token_ids: list[int] = []
    for word in words:
        ids = tokenizer.encode(word, add_special_tokens=False) if len(word) <= _MAX_SPECIAL_CHARS else []
        if len(ids) == 1 and ids[0] in tokenizer.special_ids:
            token_ids.append(ids[0])
        else:
            strings.append(word)
    return {"stop": strings} | ({"stop_token_ids": token_ids} if token_ids else {})


def split_word_list(name: str, words: np.ndarray[Any, Any] | None) -> list[list[int]]:
    """TensorRT-LLM's `[2, L]` word lists: all ids, and where each word ends (-1 pads).

    Raises:
        RequestError: the ends are not increasing, or beyond the ids.
    """
    if words is None or words.size == 0:
        return []
    ids, ends = words.reshape(2, -1).tolist()
    result: list[list[int]] = []
    start = 0
    for end in ends:
        if end == -1:
            break
        if not start < end <= len(ids):
            raise RequestError(f"{name}: its second row must hold increasing ends of words, at most {len(ids)}")
        result.append(ids[start:end])
        start = end
    return result


def bias_params(bias: np.ndarray[Any, Any] | None, vocab_size: int) -> dict[str, Any]:
    """`embedding_bias` [vocab_size]: what is added to each token's logit.

    Raises:
        RequestError: it has another length, or is not finite.
    """
    if bias is None or bias.size == 0:
        return {}
    if bias.size != vocab_size:
        raise RequestError(f"embedding_bias must have one value per token ({vocab_size}), got {bias.size}")
    if not np.isfinite(bias).all():
        raise RequestError("embedding_bias must be finite")
    flat = bias.reshape(-1)
    return {"logit_bias": {int(token_id): float(flat[token_id]) for token_id in np.flatnonzero(flat)}}


def merge_params(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Joins parameters; lists of the same name are appended."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged[name] + value if isinstance(merged.get(name), list) else value
    return {name: value for name, value in merged.items() if value != []}


def _refuse(name: str, values: np.ndarray[Any, Any] | None, neutral: tuple[float, ...]) -> None:
    if values is None or values.size == 0:
        return
    if values.dtype == np.object_:
        if any(values.reshape(-1)):
            raise RequestError(f"{name} is not supported yet; leave it out")
        return
    if not neutral:
        raise RequestError(f"{name} is not supported yet; leave it out")
    for value in values.reshape(-1).tolist():
        # FP32 inputs: 1e-6 arrives as the nearest float32.
        if not any(math.isclose(float(value), allowed, rel_tol=1e-6) for allowed in neutral):
            shown = str(value).lower() if isinstance(value, bool) else f"{value:g}"
            only = " or ".join(f"{allowed:g}" for allowed in neutral)
            raise RequestError(f"{name} = {shown} is not supported yet; leave it out, or send {only}")
