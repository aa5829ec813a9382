# SPDX-License-Identifier: Apache-2.0
"""A file that is read again when it changes, by whoever keeps what it says.

The file is asked for by `stat` at an interval: that sees an edit in place, a rename over it and a Kubernetes volume's
swapped link alike, on file systems that tell nobody of changes too.

Invariants:
    1. a file that cannot be read or parsed changes nothing: what was last good stays
    2. a file is read only after it has looked the same twice, so that one being written is not read half
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
Signature = tuple[int, int, int]

DEFAULT_PERIOD_S = 0.5

_log = logging.getLogger(__name__)


class WatchedFile(Generic[T]):
    """Reads a file now, and again whenever it changes, until closed.

    Args:
        path: the file.
        parse: what makes of its bytes what it says; raises ValueError where they are wrong.
        what: the file's role, for the log: "key file".
        period_s: how often to look.

    Attributes:
        num_errors: how often a changed file could not be taken.
        last_error: why, of the newest state of the file; None where it is good.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes], T],
        *,
        what: str,
        period_s: float = DEFAULT_PERIOD_S,
    ) -> None:
        self.path = path
        self.num_errors = 0
        self.last_error: str | None = None
        self._parse = parse
        self._what = what
        self._period_s = period_s
        self._read: Signature | None = None
        self._seen: Signature | None = None
        self._task: asyncio.Task[None] | None = None

    def load(self) -> T:
        """Reads the file for the first time.

        Raises:
            OSError: it cannot be read.
            ValueError: it is wrong.
        """
        self._read = self._seen = self._signature()
        return self._parse(self.path.read_bytes())

    def start(self, on_change: Callable[[T], None]) -> None:
        """Begins to look for changes, in a task of the running loop.

        Args:
            on_change: takes what the file says, at each good change; may raise ValueError to refuse it.
        """
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch(on_change), name=f"watch-{self.path.name}")

    async def close(self) -> None:
        """Stops looking. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def poll(self, on_change: Callable[[T], None]) -> bool:
        """Looks once; returns whether a change was taken. A change is taken by the second look that finds it."""
        try:
            signature = await asyncio.to_thread(self._signature)
            is_settled = signature == self._seen
            self._seen = signature
            if signature == self._read or not is_settled:
                return False
            data = await asyncio.to_thread(self.path.read_bytes)
            self._read = signature
            on_change(self._parse(data))
        except (OSError, ValueError) as error:
            self._fail(error)
            return False
        self.last_error = None
        _log.info("the changed %s was taken", self._what)
        return True

    def _signature(self) -> Signature:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _fail(self, error: OSError | ValueError) -> None:
        message = (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)
        if isinstance(error, OSError):
            self._read = None  # whatever comes back is read, were it the same file
            if message == self.last_error:
                return  # one outage of the file is one error, however often it is looked for
        self.num_errors += 1
        self.last_error = message
        _log.error("the changed %s is not taken, what it said before stays: %s", self._what, message)

    async def _watch(self, on_change: Callable[[T], None]) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self.poll(on_change)
