# SPDX-License-Identifier: Apache-2.0
"""One end of a connection between a process and the engine core: whole messages over a unix stream socket.

A message is its length, four bytes, and its bytes. It is written by the thread that sends it and read by the thread
that polls the socket: no thread of a library stands between, whose wake-ups cost an idle machine more than the copy.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from pathlib import Path

_LENGTH = struct.Struct("<I")
_CHUNK_BYTES = 1 << 16


class Connection:
    """Sends and receives messages without ever waiting.

    `send` and `flush` may be called by any thread, `receive` by one only. Invariants:
        1. messages arrive whole and in order; what the kernel does not take yet waits here, however much it is:
           who owns the connection polls for `wanted_events` and calls `flush` on POLLOUT
        2. once the other end is gone nothing can be sent, which is no error: `receive` returns what had come from it,
           and `is_closed` says that no more will
    """

    def __init__(self, stream: socket.socket) -> None:
        """Takes a connected stream socket, and owns it from now on."""
        stream.setblocking(False)
        self._socket = stream
        self._send_lock = threading.Lock()
        self._backlog = bytearray()
        self._received = bytearray()
        self._is_closed = False

    @classmethod
    def to(cls, path: Path) -> Connection:
        """Connects to the core that listens at `path`.

        Raises:
            OSError: nobody listens there.
        """
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(str(path))
        except OSError:
            stream.close()
            raise
        return cls(stream)

    @property
    def is_closed(self) -> bool:
        """Whether the other end is gone and all it sent was received."""
        return self._is_closed

    @property
    def has_backlog(self) -> bool:
        """Whether something waits until the other end has read more."""
        return bool(self._backlog)

    @property
    def wanted_events(self) -> int:
        """What to poll the socket for."""
        return select.POLLIN | select.POLLOUT if self._backlog else select.POLLIN

    def fileno(self) -> int:
        """The socket's descriptor, for a poller."""
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Sends a message, now or, where the other end is behind, by later calls of `flush`."""
        framed = _LENGTH.pack(len(message)) + message
        with self._send_lock:
            num_sent = 0 if self._backlog else self._write(framed)
            self._backlog += memoryview(framed)[num_sent:]

    def flush(self) -> None:
        """Sends as much of the backlog as the other end takes now."""
        with self._send_lock:
            del self._backlog[: self._write(self._backlog)]

    def receive(self) -> list[bytes]:
        """Returns the messages that have come whole."""
        while True:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:
                chunk = b""
            self._received += chunk
            if len(chunk) < _CHUNK_BYTES:
                self._is_closed = not chunk
                break
        return self._take_whole()

    def close(self, linger_s: float = 0.0) -> None:
        """Closes the connection; a backlog is sent before that if it takes no longer than `linger_s`. Idempotent."""
        with self._send_lock:
            if self._backlog and linger_s > 0.0:
                self._socket.settimeout(linger_s)
                with contextlib.suppress(OSError):  # it reads too slowly, or has gone: nobody is left to tell
                    self._socket.sendall(self._backlog, socket.MSG_NOSIGNAL)
            self._backlog.clear()
            self._socket.close()

    def _write(self, data: bytes | bytearray) -> int:
        """Returns how many bytes are dealt with; all of them where nobody is there to read them."""
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _take_whole(self) -> list[bytes]:
        received, start = self._received, 0
        messages: list[bytes] = []
        while len(received) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(received, start)[0]
            if end > len(received):
                break
            messages.append(bytes(received[start + _LENGTH.size : end]))
            start = end
        del received[:start]
        return messages
