# SPDX-License-Identifier: Apache-2.0
"""One request on its way through replicas: sent again where nothing of it was answered, never after that."""

from __future__ import annotations

import asyncio
import dataclasses
from types import TracebackType

from wavetrain_client import (
    AsyncChunkStream,
    Chunk,
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    ServerBusy,
    ServerFailed,
    StreamBroken,
)
from wavetrain_gateway.routing.replica import Lease, Replica
from wavetrain_gateway.routing.router import Route, Router
from wavetrain_gateway.upstream import Job

_FIRST_DELAY_S = 0.2
# A request that takes an engine down with it must not be given all of them.
_MAX_RETRIES_AFTER_DEATH = 1


class RoutedStream:
    """The chunks of one job, from whichever replica answers. Leaving its `async with` block cancels what runs."""

    def __init__(self, router: Router, job: Job, route: Route) -> None:
        self._router = router
        self._job = job
        self._route = route
        self._cost_tokens = max(1, job.num_prompt_tokens + job.max_output_tokens)
        self._deadline_s: float | None = None
        self._tried: list[Replica] = []
        self._num_deaths = 0
        self._replica = ""
        self._lease: Lease | None = None
        self._stream: AsyncChunkStream | None = None
        self._has_begun = False
        self._has_chunk = False
        self._is_done = False

    @property
    def replica(self) -> str:
        """The name of the replica that was asked last; "" before one was."""
        return self._replica

    async def __aenter__(self) -> RoutedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_done = True
        stream = self._stream
        if self._has_chunk:  # left before its end, perhaps because all was there
            self._note_outcome(has_failed=False)
        self._end_attempt()
        if stream is not None:
            await stream.aclose()

    def __aiter__(self) -> RoutedStream:
        return self

    async def __anext__(self) -> Chunk:
        """Waits for the next chunk.

        Raises:
            ClientError: what the replica said, or what became of it.
            Unavailable: no replica takes requests.
        """
        while not self._is_done:
            if not self._has_begun:
                await self._begin()
            if self._stream is None:
                self._start_attempt()
            chunk = await self._read()
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def _begin(self) -> None:
        self._has_begun = True
        self._router.budget.deposit()
        if self._job.generation.timeout_s is not None:
            self._deadline_s = self._router.clock() + self._job.generation.timeout_s
        for model in self._route.models:
            await self._router.replicas.wait_until_probed(model, self._router.settings.start_wait_s)

    def _start_attempt(self) -> None:
        timeout_s = None
        if self._deadline_s is not None:
            timeout_s = self._deadline_s - self._router.clock()
            if timeout_s <= 0:
                self._is_done = True
                raise DeadlineExceeded("the request was not finished within its timeout_s; give it more time")
        try:
            lease = self._router.lease(self._route, self._cost_tokens, self._job.num_prompt_tokens, self._tried)
        except BaseException:
            self._is_done = True
            raise
        self._lease = lease
        self._replica = lease.replica.name
        generation = dataclasses.replace(
            self._job.generation, model=lease.replica.entry.triton_model, timeout_s=timeout_s
        )
        self._stream = lease.replica.client.open(generation)

    async def _read(self) -> Chunk | None:
        """Reads on; returns None where the request is over, or is to be sent again."""
        stream, lease = self._stream, self._lease
        if stream is None or lease is None:  # closed by another task
            return None
        try:
            chunk = await anext(stream)
        except StopAsyncIteration:
            self._is_done = True
            self._note_outcome(has_failed=False)
            self._end_attempt()
            return None
        except ClientError as error:
            await self._recover(error, lease)
            return None
        except BaseException:
            self._is_done = True
            stream.close()
            self._end_attempt()
            raise
        self._has_chunk = True
        lease.note_chunk(chunk.num_output_tokens or 0)
        return chunk

    async def _recover(self, error: ClientError, lease: Lease) -> None:
        """Prepares the next attempt, or raises the error."""
        has_failed = _is_replicas_fault(error)
        self._note_outcome(has_failed=has_failed)
        self._end_attempt(has_failed=has_failed)
        self._num_deaths += isinstance(error, ServerFailed)
        self._tried.append(lease.replica)
        if not self._may_retry(error):
            self._is_done = True
            raise error
        if not self._router.budget.withdraw():
            self._router.counts["retries_refused"] += 1
            self._is_done = True
            raise error
        self._router.counts["retries"] += 1
        if not self._router.has_untried(self._route, self._tried):
            delay_s = _FIRST_DELAY_S * 2.0 ** (len(self._tried) - 1) * self._router.rng.uniform(0.5, 1.0)
            if self._deadline_s is not None and self._router.clock() + delay_s >= self._deadline_s:
                self._is_done = True
                raise error
            await asyncio.sleep(delay_s)

    def _may_retry(self, error: ClientError) -> bool:
        if self._has_chunk or self._is_done or len(self._tried) > self._router.settings.retry.max_retries:
            return False
        if isinstance(error, ServerFailed):
            return error.word == "dead" and self._num_deaths <= _MAX_RETRIES_AFTER_DEATH
        return isinstance(error, (ConnectionFailed, ServerBusy))

    def _note_outcome(self, *, has_failed: bool) -> None:
        if self._lease is not None:
            self._router.replicas.note_outcome(self._lease.replica, has_failed=has_failed)

    def _end_attempt(self, *, has_failed: bool = False) -> None:
        lease, self._lease, self._stream = self._lease, None, None
        if lease is not None:
            lease.end(has_failed=has_failed)


def _is_replicas_fault(error: ClientError) -> bool:
    """Whether the failure says something of the replica. What one request alone could bring about does not: else any
    caller could have all replicas taken out.
    """
    if isinstance(error, ServerFailed):
        return error.word == "dead"
    return isinstance(error, (ConnectionFailed, StreamBroken))
