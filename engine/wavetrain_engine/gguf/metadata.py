# SPDX-License-Identifier: Apache-2.0
"""The key-value part of a GGUF file: typed access, with messages that name the key."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from wavetrain_engine.errors import CheckpointError
from wavetrain_engine.gguf.byte_cursor import ByteCursor

# The format's numbers of value types → codes of the struct module.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
# From here on a number rounds to no float32, which the struct module refuses.
_FLOAT32_END = 3.4028235677973366e38


@dataclass(frozen=True, slots=True)
class MetadataArray:
    """An array, kept as the bytes it was; most readers of a file want none of its large ones."""

    type_id: int
    count: int
    data: bytes


Value = int | float | bool | str | MetadataArray


class Metadata:
    """The values of a GGUF file by key. Each method raises CheckpointError for a value of another type.

    Args:
        where: the file's name, for messages.
    """

    def __init__(self, values: Mapping[str, Value], where: str) -> None:
        self._values = values
        self.where = where

    @classmethod
    def read(cls, cursor: ByteCursor, count: int, where: str) -> Metadata:
        """Reads `count` pairs.

        Raises:
            CheckpointError: the file is too short, a key occurs twice, a type is unknown or an array of arrays.
        """
        values: dict[str, Value] = {}
        for _ in range(count):
            key = cursor.string("a metadata key")
            if key in values:
                raise CheckpointError(f"{where}: the metadata key {shown(key)} occurs twice; download it again")
            values[key] = _read_value(cursor, key, where)
        return cls(values, where)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys_of(self, prefix: str) -> list[str]:
        """Returns all keys that begin so, in the order of the file."""
        return [key for key in self._values if key.startswith(prefix)]

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns an int; `default` where there is none."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Returns an int; None where there is none."""
        return self.integer(key) if key in self._values else None

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a float; `default` where there is none.

        A float32 becomes the shortest decimal that is it: 1e-5 of a config.json is 1e-5 again.
        """
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Returns a float; None where there is none."""
        return self.number(key) if key in self._values else None

    def boolean(self, key: str, default: bool) -> bool:
        """Returns a bool; `default` where there is none."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Returns a str; `default` where there is none."""
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def optional_string(self, key: str) -> str | None:
        """Returns a str; None where there is none."""
        return self.string(key) if key in self._values else None

    def strings(self, key: str) -> list[str]:
        """Returns an array of strings."""
        array = self._array(key, "an array of strings")
        if array.type_id != _STRING:
            raise self._wrong(key, "an array of strings")
        strings: list[str] = []
        position = 0
        try:
            for _ in range(array.count):
                start = position + 8
                position = start + int.from_bytes(array.data[position:start], "little")
                strings.append(array.data[start:position].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.where}: string {len(strings)} of {shown(key)} is not valid UTF-8; download it again"
            ) from error
        return strings

    def integers(self, key: str) -> list[int]:
        """Returns an array of integers."""
        array = self._array(key, "an array of integers")
        if array.type_id in (_STRING, _BOOL) or _SCALARS[array.type_id] in "fd":
            raise self._wrong(key, "an array of integers")
        return [int(number) for number in _numbers(array)]

    def floats(self, key: str) -> list[float]:
        """Returns an array of numbers."""
        array = self._array(key, "an array of numbers")
        if array.type_id in (_STRING, _BOOL):
            raise self._wrong(key, "an array of numbers")
        return [float(number) for number in _numbers(array)]

    def is_array(self, key: str) -> bool:
        """Whether there is such a key, and it is an array."""
        return isinstance(self._values.get(key), MetadataArray)

    def wrong(self, key: str, why: str) -> CheckpointError:
        """Returns the error for a value that cannot be."""
        return CheckpointError(f"{self.where}: metadata {shown(key)}: {why}")

    def _array(self, key: str, expected: str) -> MetadataArray:
        value = self._values.get(key)
        if not isinstance(value, MetadataArray):
            raise self._wrong(key, expected)
        return value

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        value = self._values.get(key)
        if value is None:
            return CheckpointError(f"{self.where} lacks the metadata {shown(key)} ({expected})")
        kind = f"an array of {value.count}" if isinstance(value, MetadataArray) else shown(value)
        return CheckpointError(f"{self.where}: metadata {shown(key)} must be {expected}, got {kind}")


def shown(value: object) -> str:
    """Returns a short form of a name or value out of a file; no escape sequence of it may reach a terminal."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _numbers(array: MetadataArray) -> tuple[int | float, ...]:
    return struct.unpack(f"<{array.count}{_SCALARS[array.type_id]}", array.data)


def _shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to a float32."""
    for num_digits in range(1, 10):
        short = float(f"{value:.{num_digits}g}")
        if abs(short) < _FLOAT32_END and struct.unpack("<f", struct.pack("<f", short))[0] == value:
            return short
    return value


def _read_value(cursor: ByteCursor, key: str, where: str) -> Value:
    what = f"metadata {shown(key)}"
    type_id: int = cursor.number("I", what)
    if type_id == _STRING:
        return cursor.string(what)
    if type_id == _ARRAY:
        return _read_array(cursor, what, where)
    if type_id not in _SCALARS:
        raise CheckpointError(f"{where}: {what} is of unknown type {type_id}; download it again")
    value = cursor.number(_SCALARS[type_id], what)
    if type_id == _BOOL:
        if value > 1:
            raise CheckpointError(f"{where}: {what} must be 0 or 1, as a truth value, got {value}")
        return bool(value)
    return _shortest(value) if type_id == _FLOAT32 else value


def _read_array(cursor: ByteCursor, what: str, where: str) -> MetadataArray:
    type_id: int = cursor.number("I", what)
    count: int = cursor.number("Q", what)
    if type_id == _STRING:
        return MetadataArray(type_id, count, cursor.string_array(count, what))
    if type_id not in _SCALARS:
        kind = "an array of arrays" if type_id == _ARRAY else f"of unknown type {type_id}"
        raise CheckpointError(f"{where}: {what} is {kind}, which is not supported")
    return MetadataArray(type_id, count, cursor.take(count * struct.calcsize(f"<{_SCALARS[type_id]}"), what))
