# SPDX-License-Identifier: Apache-2.0
"""The head of a binary file, read value by value, with every length compared with what the file has first."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from wavetrain_engine.errors import CheckpointError

# Ten times the largest vocabularies. It bounds what a length can make us read of a file of any size.
_MAX_HEAD_BYTES = 2**28
_FIRST_READ_BYTES = 2**22


class ByteCursor:
    """A position in the head of a little-endian file.

    Every method moves past what it returns, and raises CheckpointError where the file ends before that does.

    Args:
        size: of the whole file, in bytes.
        name: of the file, for messages.
    """

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file = file
        self._size = size
        self._name = name
        self._data = bytearray()
        self.position = 0

    def skip(self, num_bytes: int, what: str) -> int:
        """Moves on; returns where it was.

        Args:
            what: is being read, for the message: a key or a tensor.
        """
        start = self.position
        if num_bytes > self._size - start:
            raise CheckpointError(
                f"{self._name} is truncated or lies about its sizes: {what} needs {num_bytes} bytes at byte {start}, "
                f"the file has {self._size}; download it again"
            )
        if start + num_bytes > _MAX_HEAD_BYTES:
            raise CheckpointError(f"{self._name}: its metadata, up to {what}, is larger than {_MAX_HEAD_BYTES} bytes")
        self.position = start + num_bytes
        if self.position > len(self._data):
            self._read_on()
        return start

    def take(self, num_bytes: int, what: str) -> bytes:
        """Returns the next bytes."""
        start = self.skip(num_bytes, what)
        return bytes(self._data[start : self.position])

    def number(self, code: str, what: str) -> Any:
        """Returns the next number, by its code of the struct module."""
        start = self.skip(struct.calcsize(f"<{code}"), what)
        return struct.unpack_from(f"<{code}", self._data, start)[0]

    def string(self, what: str) -> str:
        """Returns the next string: its length in 8 bytes, then UTF-8."""
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._name}: {what} is not valid UTF-8; download it again") from error

    def string_array(self, count: int, what: str) -> bytes:
        """Returns the bytes of `count` strings, which lie one after the other; all of them are there."""
        start = self.position
        if count > (self._size - start) // 8:  # the shortest has its length alone
            self.skip(8 * count, what)
        for _ in range(count):
            self.skip(self.number("Q", what), what)
        return bytes(self._data[start : self.position])

    def _read_on(self) -> None:
        # Twice as much each time: few reads, and little of the weights behind the head.
        wanted = max(self.position, 2 * len(self._data), _FIRST_READ_BYTES)
        self._data += self._file.read(min(wanted, self._size) - len(self._data))
        if len(self._data) < self.position:
            raise CheckpointError(f"{self._name} became shorter while it was read; load the model again")
