# SPDX-License-Identifier: Apache-2.0
"""Calls to a real Triton server with NVIDIA's own client, not ours: the server's tests must not share its faults."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpc_aio
from tritonclient.utils import np_to_triton_dtype

_DTYPES: dict[type, Any] = {bool: np.bool_, int: np.int32, float: np.float32, str: np.object_, bytes: np.object_}
_UINT64 = {"seed", "lora_task_id", "prompt_table_extra_id"}
WITH_BATCH = {"ensemble", "engine", "tokenizer", "detokenizer"}


@dataclass
class Chunk:
    """One response of a stream."""

    outputs: dict[str, Any]
    shapes: dict[str, list[int]]
    is_final: bool

    @property
    def text(self) -> str:
        return "".join(value.decode("utf-8") for value in np.ravel(self.outputs["text_output"]))


@dataclass
class Stream:
    """A whole stream: its chunks, then perhaps an error."""

    chunks: list[Chunk] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


def infer_input(name: str, value: Any, *, has_batch: bool) -> grpc_aio.InferInput:
    """An input from a scalar, a list or an array, in the shape that the model declares; a batch dimension is added."""
    if not isinstance(value, np.ndarray):
        values = value if isinstance(value, list) else [value]
        kind = np.uint64 if name in _UINT64 else _DTYPES[type(values[0])]
        if kind is np.object_:
            values = [item.encode() if isinstance(item, str) else item for item in values]
        value = np.array(values, dtype=kind)
    value = value[None] if has_batch else value
    item = grpc_aio.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    item.set_data_from_numpy(value)
    return item


async def open_stream(
    client: grpc_aio.InferenceServerClient,
    model: str,
    inputs: dict[str, Any],
    *,
    request_id: str = "",
    parameters: dict[str, Any] | None = None,
    batched: bool = False,
) -> Any:
    """Starts one call; iterate it with `read`, end it early with `.cancel()`. `batched`: arrays have their rows."""
    has_batch = model in WITH_BATCH and not batched
    tensors = [infer_input(name, value, has_batch=has_batch) for name, value in inputs.items()]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": model,
            "inputs": tensors,
            "request_id": request_id,
            "parameters": parameters,
            "enable_empty_final_response": True,
        }

    return client.stream_infer(requests())


async def read(call: Any, stream: Stream, *, at_most: int | None = None) -> Stream:
    """Reads a call's responses into `stream`, up to the final one, an error, or `at_most`."""
    async for result, error in call:
        if error is not None:
            stream.errors.append(str(error))
            return stream
        message = result.get_response()
        is_final = message.parameters["triton_final_response"].bool_param
        outputs = {item.name: result.as_numpy(item.name) for item in message.outputs}
        if outputs:
            shapes = {item.name: list(item.shape) for item in message.outputs}
            stream.chunks.append(Chunk(outputs, shapes, is_final))
        if is_final or (at_most is not None and len(stream.chunks) >= at_most):
            return stream
    return stream


async def generate(url: str, model: str, inputs: dict[str, Any], **options: Any) -> Stream:
    """One request, start to end, on a connection of its own."""
    async with grpc_aio.InferenceServerClient(url) as client:
        return await generate_on(client, model, inputs, **options)


async def generate_on(
    client: grpc_aio.InferenceServerClient, model: str, inputs: dict[str, Any], **options: Any
) -> Stream:
    """One request, start to end."""
    call = await open_stream(client, model, inputs, **options)
    stream = await asyncio.wait_for(read(call, Stream()), 60)
    await asyncio.wait_for(read(call, Stream()), 10)  # the server closes the stream: a call cut off here is a cancel
    return stream


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST of JSON, answered by JSON: status and body."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def post_events(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """POST answered by server-sent events."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = response.read().decode("utf-8").splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
