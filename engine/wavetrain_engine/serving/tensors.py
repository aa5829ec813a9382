# SPDX-License-Identifier: Apache-2.0
"""Reading a Triton request's tensors row by row, and making tensors for its responses.

With a batch dimension every tensor begins with the row; models without one have exactly one row. A scalar
that Triton has reshaped to `[]` arrives as `[rows]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.errors import RequestError

Number = TypeVar("Number", int, float)


class RequestTensors:
    """The inputs of one Triton request.

    Raises:
        RequestError: rows of different inputs do not match in number.
    """

    def __init__(self, request: Any, *, has_batch_dimension: bool) -> None:
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        for item in request.inputs():
            array: np.ndarray[Any, Any] = item.as_numpy()
            if not has_batch_dimension:
                array = array[None]
            self._arrays[item.name()] = array[:, None] if array.ndim == 1 else array
        counts = {array.shape[0] for array in self._arrays.values()}
        if len(counts) > 1:
            raise RequestError("the inputs have different batch sizes; give every input one row per prompt")
        self.num_rows = counts.pop() if counts else 1

    @property
    def names(self) -> Sequence[str]:
        """The inputs that the request carries."""
        return list(self._arrays)

    def row(self, name: str, row: int) -> np.ndarray[Any, Any] | None:
        """One row of an input, without the batch dimension; None where the request has no such input."""
        array = self._arrays.get(name)
        return None if array is None else array[row]

    def scalar(self, name: str, row: int) -> Any | None:
        """One row of an input of a single element, as a Python value; None where it is absent or empty.

        Raises:
            RequestError: it has more than one element.
        """
        values = self.row(name, row)
        if values is None or values.size == 0:
            return None
        if values.size > 1:
            raise RequestError(f"{name} must have one element per prompt, got {values.size}")
        return values.reshape(-1)[0].item() if values.dtype != np.object_ else values.reshape(-1)[0]

    def text(self, name: str, row: int) -> str | None:
        """One row of a string input of a single element; None where it is absent.

        Raises:
            RequestError: it is not valid UTF-8, or has more than one element.
        """
        value = self.scalar(name, row)
        return None if value is None else decode_text(name, value)

    def texts(self, name: str, row: int) -> list[str]:
        """One row of a string input; empty strings, which pad rows of different lengths, are left out.

        Raises:
            RequestError: one is not valid UTF-8.
        """
        values = self.row(name, row)
        if values is None:
            return []
        return [text for value in values.reshape(-1) if (text := decode_text(name, value))]

    def token_ids(self, name: str, row: int) -> list[int] | None:
        """One row of an integer input, flat; None where it is absent."""
        values = self.row(name, row)
        return None if values is None else values.reshape(-1).tolist()


def decode_text(name: str, value: bytes | str) -> str:
    """The text of one string element.

    Raises:
        RequestError: it is not valid UTF-8.
    """
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not valid UTF-8 (byte {error.start}); send UTF-8 text") from error


def text_tensor(name: str, rows: Sequence[Sequence[str]], *, has_batch_dimension: bool) -> Any:
    """A string output `[rows, n]`; without a batch dimension the one row's `[n]`."""
    array = np.array([[text.encode("utf-8", "replace") for text in row] for row in rows], dtype=np.object_)
    return pb_utils.Tensor(name, array if has_batch_dimension else array[0])


def tensor(name: str, rows: Sequence[Any], dtype: Any, *, has_batch_dimension: bool) -> Any:
    """A numeric output with a row for each of the request's; without a batch dimension the one row alone."""
    array = np.asarray(rows, dtype=dtype)
    return pb_utils.Tensor(name, array if has_batch_dimension else array[0])


def padded(rows: Sequence[Sequence[list[Number]]], fills: Sequence[Number]) -> list[list[list[Number]]]:
    """The rows' lists, all made as long as the longest with their row's `fills`."""
    if len(rows) == len(rows[0]) == 1:  # nearly every streamed response
        return [list(rows[0])]
    width = max(len(values) for row in rows for values in row)
    return [[values + [fill] * (width - len(values)) for values in row] for row, fill in zip(rows, fills, strict=True)]
