# SPDX-License-Identifier: Apache-2.0
"""Tensors as they lie on the wire: a name, a Triton data type, a shape and little-endian bytes.

Numbers and strings only, small ones: no numpy array is made for a chunk of a few bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from wavetrain_client.errors import RequestRejected, ServerFailed

_FORMATS = {
    "BOOL": "?",
    "INT8": "b",
    "UINT8": "B",
    "INT16": "h",
    "UINT16": "H",
    "INT32": "i",
    "UINT32": "I",
    "INT64": "q",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}


class Tensor(NamedTuple):
    """One input or output tensor; `data` is its raw content."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    def values(self) -> list[Any]:
        """Returns the elements in row-major order; BYTES elements as bytes.

        Raises:
            ServerFailed: the content does not fit the data type or the shape.
        """
        return decode_values(self.name, self.datatype, self.shape, self.data)


def encode_tensor(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """Packs values into a tensor. BYTES takes str, encoded as UTF-8.

    Raises:
        RequestRejected: a value is of the wrong type or does not fit the data type.
    """
    if datatype == "BYTES":
        return Tensor(name, datatype, tuple(shape), _pack_strings(name, values))
    try:
        data = struct.pack(f"<{len(values)}{_FORMATS[datatype]}", *values)
    except (struct.error, OverflowError, TypeError):
        shown = str(values[0] if len(values) == 1 else list(values))[:64]
        raise RequestRejected(f"{name} must be {_describe(datatype)}, got {shown}") from None
    return Tensor(name, datatype, tuple(shape), data)


def decode_values(name: str, datatype: str, shape: Sequence[int], data: bytes) -> list[Any]:
    """Unpacks raw content into its elements; see `Tensor.values`."""
    count = math.prod(shape)
    try:
        found = (
            _unpack_strings(data) if datatype == "BYTES" else list(struct.unpack(f"<{count}{_FORMATS[datatype]}", data))
        )
    except (struct.error, KeyError):
        found = None
    if found is None or len(found) != count:
        raise ServerFailed(f"the server sent an output {name} that does not fit its {datatype}{list(shape)}")
    return found


def _describe(datatype: str) -> str:
    if datatype == "BOOL":
        return "true or false"
    if datatype.startswith("FP"):
        return "a number"
    return f"an integer that fits {datatype}"


def _pack_strings(name: str, values: Iterable[Any]) -> bytes:
    parts: list[bytes] = []
    for value in values:
        if not isinstance(value, str):
            raise RequestRejected(f"{name} must be text, got {type(value).__name__}")
        try:
            raw = value.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestRejected(f"{name} holds half a surrogate pair, which is not valid text; remove it") from None
        parts += (struct.pack("<I", len(raw)), raw)
    return b"".join(parts)


def _unpack_strings(data: bytes) -> list[bytes]:
    found: list[bytes] = []
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<I", data, start)
        start += 4
        if start + length > len(data):
            raise struct.error("string longer than its tensor")
        found.append(data[start : start + length])
        start += length
    return found
