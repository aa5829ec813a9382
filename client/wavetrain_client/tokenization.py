# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, as the models `tokenizer` and `detokenizer` have it: pure functions, no I/O."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from wavetrain_client.errors import RequestRejected, ServerFailed
from wavetrain_client.options import ChatPrompt
from wavetrain_client.tensor import decode_values, encode_tensor
from wavetrain_client.wire import WireRequest

TOKENIZER_MODEL = "tokenizer"
DETOKENIZER_MODEL = "detokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """A prompt as token ids, and how many the model takes of prompt and output together, where the server says so."""

    token_ids: tuple[int, ...]
    max_model_len: int | None = None


def encode_tokenize(prompt: str | ChatPrompt, *, add_special_tokens: bool = True, request_id: str = "") -> WireRequest:
    """Builds what asks for a prompt's token ids.

    Raises:
        RequestRejected: the text is not valid Unicode.
    """
    text = prompt if isinstance(prompt, str) else ""
    tensors = [encode_tensor("text_input", "BYTES", (1, 1), [text])]
    if isinstance(prompt, ChatPrompt):
        messages, variables = prompt.to_json()
        tensors.append(encode_tensor("messages", "BYTES", (1, 1), [messages]))
        tensors.append(encode_tensor("template_variables", "BYTES", (1, 1), [variables]))
    elif not add_special_tokens:
        tensors.append(encode_tensor("add_special_tokens", "BOOL", (1, 1), [False]))
    return WireRequest(model=TOKENIZER_MODEL, id=request_id, tensors=tensors)


def encode_detokenize(token_ids: Sequence[int], *, request_id: str = "") -> WireRequest:
    """Builds what asks for the text of token ids.

    Raises:
        RequestRejected: there is none, or one does not fit 32 bits.
    """
    if not token_ids:
        raise RequestRejected("there must be at least one token id")
    tensor = encode_tensor("token_ids", "INT32", (1, len(token_ids)), token_ids)
    return WireRequest(model=DETOKENIZER_MODEL, id=request_id, tensors=[tensor])


def encode_tokenizer_info(*, request_id: str = "") -> WireRequest:
    """Builds what asks what the tokenizer is."""
    tensors = [
        encode_tensor("text_input", "BYTES", (1, 1), ["1"]),
        encode_tensor("return_tokenizer_info", "BOOL", (1, 1), [True]),
    ]
    return WireRequest(model=TOKENIZER_MODEL, id=request_id, tensors=tensors)


def decode_tokenizer_info(response: Any) -> dict[str, Any]:
    """Reads what `tokenizer` says of itself, in the words of a checkpoint's tokenizer_config.json.

    Raises:
        ServerFailed: it makes no sense.
    """
    found = _outputs(response, {"tokenizer_info"}).get("tokenizer_info")
    try:
        info: object = json.loads(found[0]) if found else None
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ServerFailed("the tokenizer does not say what it is")
    return cast("dict[str, Any]", info)


def decode_tokenization(response: Any) -> Tokenization:
    """Reads the answer of `tokenizer`.

    Raises:
        ServerFailed: it makes no sense.
    """
    outputs = _outputs(response, {"input_ids", "input_lengths", "max_model_len"})
    if not outputs.get("input_lengths") or "input_ids" not in outputs:
        raise ServerFailed("the tokenizer answered without token ids")
    length = int(outputs["input_lengths"][0])
    longest = outputs.get("max_model_len")
    return Tokenization(
        token_ids=tuple(outputs["input_ids"][:length]), max_model_len=int(longest[0]) if longest else None
    )


def decode_text(response: Any) -> str:
    """Reads the answer of `detokenizer`.

    Raises:
        ServerFailed: it makes no sense.
    """
    texts = _outputs(response, {"text_output"}).get("text_output")
    if not texts:
        raise ServerFailed("the detokenizer answered without text")
    return texts[0].decode("utf-8", "replace")


def _outputs(response: Any, names: set[str]) -> dict[str, list[Any]]:
    pairs = zip(response.outputs, response.raw_output_contents, strict=False)
    return {
        output.name: decode_values(output.name, output.datatype, tuple(output.shape), content)
        for output, content in pairs
        if output.name in names
    }
