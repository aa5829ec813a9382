# SPDX-License-Identifier: Apache-2.0
"""What runs now, and whether more may begin: requests by their id, and draining."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from wavetrain_gateway.errors import Conflict, NotFound, RequestCancelled, Unavailable
from wavetrain_gateway.feed import Feed

_RETRY_AFTER_S = 5.0


class Lifecycle:
    """Counts running requests. Everything happens on the event loop."""

    def __init__(self) -> None:
        self._feeds: dict[str, tuple[str, Feed]] = {}
        self._num_active = 0
        self._is_draining = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_draining(self) -> bool:
        """Whether new work is refused."""
        return self._is_draining

    @property
    def num_active(self) -> int:
        """Requests that are being worked on."""
        return self._num_active

    @contextmanager
    def active(self) -> Generator[None, None, None]:
        """Counts a piece of work while it lasts.

        Raises:
            Unavailable: the gateway is draining.
        """
        if self._is_draining:
            raise Unavailable(
                "this gateway is shutting down; send the request again, to another one where there is one",
                code="draining",
                retry_after_s=_RETRY_AFTER_S,
                headers={"connection": "close"},
            )
        self._num_active += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._is_idle.set()

    @contextmanager
    def running(self, request_id: str, owner: str, feed: Feed) -> Generator[None, None, None]:
        """Makes a request known by its id while it runs.

        Raises:
            Conflict: another request of this id runs.
        """
        if request_id in self._feeds:
            raise Conflict("a request with this x-request-id is running; give each its own", param="x-request-id")
        self._feeds[request_id] = (owner, feed)
        try:
            yield
        finally:
            del self._feeds[request_id]

    def cancel(self, request_id: str, owner: str) -> None:
        """Ends a running request of the owner's.

        Raises:
            NotFound: none of this id runs; it may have ended a moment ago.
        """
        found = self._feeds.get(request_id)
        if found is None or found[0] != owner:
            raise NotFound("no request of this id is running; it may have ended already", code="request_not_found")
        found[1].fail(RequestCancelled("the request was cancelled by its id"))

    def drain(self) -> None:
        """Refuses new work from now on; what runs goes on."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits for running requests to end. Returns whether they have."""
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def end_all(self) -> None:
        """Ends what still runs, each with an error that says why."""
        for _, feed in self._feeds.values():
            feed.fail(Unavailable("this gateway is shutting down", code="server_shutdown"))
