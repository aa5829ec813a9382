# SPDX-License-Identifier: Apache-2.0
"""Admission by API key: who asks, what the key allows, and what is left of its limits.

Order matters: streams and tokens, which can be given back, then the request, which cannot. So what is refused has
counted nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from wavetrain_gateway.admission import Caller, Demand, Ticket
from wavetrain_gateway.errors import Forbidden, InvalidRequest, RateLimited, Unauthenticated
from wavetrain_gateway.key_entry import KeyTable, TierEntry
from wavetrain_gateway.keys import KeyRing, key_in
from wavetrain_gateway.limits.rate import Allowance, as_duration
from wavetrain_gateway.limits.shared_streams import SharedStreams, StreamHold, StreamsFull
from wavetrain_gateway.limits.shared_windows import SharedHold, SharedWindows
from wavetrain_gateway.limits.store_guard import StoreGuard
from wavetrain_gateway.limits.wrong_keys import WrongKeys
from wavetrain_gateway.watched_file import WatchedFile

# A stream ends when it ends: the wait is a guess, and short, as many streams are.
_STREAM_RETRY_AFTER_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """What one request has taken so far."""

    key_id: str
    limits: TierEntry
    streams: StreamHold | None = None
    tokens: SharedHold | None = None


class KeyedAdmission:
    """Lets in whoever has a key and something left of its limits.

    Args:
        ring: the keys.
        windows: requests and tokens per minute.
        streams: sequences that run at once; None: counted in this process.
        key_file: where the keys are read from again when they change; None where they do not.
        guard: of the store that both are shared on; None where there is none.
        wrong_keys: slows down who has none.

    Attributes:
        num_refused: by (caller, limit), how often a limit refused a request.
    """

    def __init__(
        self,
        ring: KeyRing,
        windows: SharedWindows,
        *,
        streams: SharedStreams | None = None,
        key_file: WatchedFile[KeyTable] | None = None,
        guard: StoreGuard | None = None,
        wrong_keys: WrongKeys | None = None,
    ) -> None:
        self.num_refused: Counter[tuple[str, str]] = Counter()
        self._ring = ring
        self._windows = windows
        self._key_file = key_file
        self._guard = guard
        self._wrong_keys = wrong_keys or WrongKeys()
        self._streams = streams or SharedStreams()
        self._settling: set[asyncio.Future[Any]] = set()

    @property
    def num_key_file_errors(self) -> int:
        """How often a changed key file could not be taken."""
        return self._key_file.num_errors if self._key_file is not None else 0

    @property
    def num_store_failures(self) -> int:
        """How often the shared store was found down."""
        return self._guard.num_failures if self._guard is not None else 0

    @property
    def is_store_down(self) -> bool:
        """Whether the shared store does not answer."""
        return self._guard is not None and self._guard.is_down

    def num_running(self, caller: str) -> int:
        """How many sequences of a caller, by its name, this gateway runs now."""
        return self._streams.running(caller)

    async def start(self) -> None:
        """Begins to watch the key file, and connects to the store."""
        if self._key_file is not None:
            self._key_file.start(self._ring.replace)
        if self._guard is not None:
            await self._guard.start()
        self._streams.start()

    async def close(self) -> None:
        """Stops watching, and finishes what is being given back. Idempotent."""
        if self._key_file is not None:
            await self._key_file.close()
        if self._settling:
            await asyncio.wait(self._settling)
        await self._streams.close()
        if self._guard is not None:
            await self._guard.close()

    def authenticate(self, headers: Mapping[str, str], client_host: str) -> Caller:
        """Says who asks, by `authorization: Bearer KEY` or `x-api-key: KEY`.

        Raises:
            Unauthenticated: no key, or none that is known.
            RateLimited: too many wrong keys from this address.
        """
        key = key_in(headers)
        caller = self._ring.find(key) if key is not None else None
        if caller is not None:
            return caller
        wait_s = self._wrong_keys.wait_s(client_host)
        if wait_s > 0:
            raise RateLimited(
                "too many requests without a known API key from this address; wait, and send a key",
                code="too_many_wrong_keys",
                retry_after_s=wait_s,
            )
        if key is None:
            message = "an API key is needed; send it as the header 'Authorization: Bearer KEY'"
            raise Unauthenticated(message, code="missing_api_key")
        raise Unauthenticated("the API key is not known; check it, or ask for a new one")

    async def admit(self, caller: Caller, demand: Demand) -> Ticket:
        """Lets a request in, counting it.

        Raises:
            RateLimited: with Retry-After and the x-ratelimit-* headers; nothing was counted then.
            InvalidRequest: it may use more tokens than the key has in a whole minute.
            Forbidden: the key may not use the model.
            Unauthenticated: the key was taken away since the caller was authenticated.
            Unavailable: the limits' store is down, and the limits are closed then.
        """
        if not caller.may_use(demand.model):
            raise Forbidden("the API key may not use this model; GET /v1/models lists those it may")
        limits = self._ring.limits_of(caller)
        if limits is None:
            raise Unauthenticated("the API key is not known any more; ask for a new one")
        held = _Held(caller.name, limits)
        try:
            await self._take_streams(held, demand)
            await self._take_tokens(held, demand)
            await self._take_request(held)
            headers = await self._headers(held)
        except BaseException:  # a cancelled request too gives back what it has taken
            await self.settle(held, 0)
            raise
        return _KeyTicket(self, held, headers)

    async def settle(self, held: _Held, num_tokens: int) -> None:
        """Gives back what a request held; for the tickets. Goes on when the caller is cancelled."""
        streams, held.streams = held.streams, None
        tokens, held.tokens = held.tokens, None
        limit = held.limits.tokens_per_minute
        work: list[Coroutine[Any, Any, None]] = []
        if streams is not None:
            work.append(self._give_back(streams))
        if tokens is not None and limit is not None:
            work.append(self._settle_tokens(held.key_id, limit, tokens, num_tokens))
        if work:
            task = asyncio.gather(*work)
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
            await asyncio.shield(task)

    async def _take_streams(self, held: _Held, demand: Demand) -> None:
        limit = held.limits.max_streams
        try:
            held.streams = await self._streams.take(held.key_id, limit, demand.num_streams)
        except StreamsFull as full:
            self.num_refused[held.key_id, "streams"] += 1
            raise RateLimited(
                f"the API key may run {limit} sequences at once, and {full.num_running} are running; "
                "wait for one to end",
                code="too_many_streams",
                retry_after_s=_STREAM_RETRY_AFTER_S,
            ) from None

    async def _take_tokens(self, held: _Held, demand: Demand) -> None:
        limit = held.limits.tokens_per_minute
        amount = demand.num_prompt_tokens + demand.max_output_tokens
        if limit is None or amount <= 0:
            return
        if amount > limit:
            self.num_refused[held.key_id, "tokens"] += 1
            raise InvalidRequest(
                f"the request may use {amount} tokens, and the API key has {limit} a minute; ask for fewer max_tokens, "
                "or send a shorter prompt",
                code="tokens_per_minute_exceeded",
                param="max_tokens",
            )
        held.tokens = await self._windows.take_tokens(held.key_id, limit, amount)
        if held.tokens is None:
            self.num_refused[held.key_id, "tokens"] += 1
            wait_s = await self._windows.wait_for_tokens_s(held.key_id, limit, amount)
            raise RateLimited(
                f"the API key's {limit} tokens a minute are used up; the request may use {amount}",
                retry_after_s=wait_s,
                headers=await self._headers(held),
            )

    async def _take_request(self, held: _Held) -> None:
        limit = held.limits.requests_per_minute
        if limit is None or await self._windows.take_request(held.key_id, limit):
            return
        self.num_refused[held.key_id, "requests"] += 1
        allowance = await self._windows.requests(held.key_id, limit)
        raise RateLimited(
            f"the API key's {limit} requests a minute are used up",
            retry_after_s=allowance.reset_s,
            headers=await self._headers(held),
        )

    async def _headers(self, held: _Held) -> dict[str, str]:
        """OpenAI's headers for the limits that the key has."""
        headers: dict[str, str] = {}
        if held.limits.requests_per_minute is not None:
            headers |= _as_headers(
                "requests", await self._windows.requests(held.key_id, held.limits.requests_per_minute)
            )
        if held.limits.tokens_per_minute is not None:
            headers |= _as_headers("tokens", await self._windows.tokens(held.key_id, held.limits.tokens_per_minute))
        return headers

    async def _give_back(self, streams: StreamHold) -> None:
        try:
            await self._streams.give_back(streams)
        except Exception:
            # A ticket's `settle` never raises; and the lease runs out by itself.
            _log.exception("streams of the key %s could not be given back", streams.key_id)

    async def _settle_tokens(self, key_id: str, limit: int, tokens: SharedHold, num_tokens: int) -> None:
        try:
            await self._windows.settle_tokens(key_id, limit, tokens, num_tokens)
        except Exception:
            # A ticket's `settle` never raises; and the reservation runs out by itself.
            _log.exception("tokens of the key %s could not be given back", key_id)


class _KeyTicket:
    """A request that was let in by a key's limits."""

    def __init__(self, admission: KeyedAdmission, held: _Held, headers: Mapping[str, str]) -> None:
        self._admission = admission
        self._held = held
        self._headers = headers
        self._is_settled = False

    @property
    def headers(self) -> Mapping[str, str]:
        """The x-ratelimit-* headers, as they were when the request was let in."""
        return self._headers

    async def settle(self, num_tokens: int) -> None:
        """Gives back the stream, and what was not used of the tokens. Doing it twice does no harm."""
        if not self._is_settled:
            self._is_settled = True
            await self._admission.settle(self._held, num_tokens)


def _as_headers(kind: str, allowance: Allowance) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(allowance.limit),
        f"x-ratelimit-remaining-{kind}": str(allowance.remaining),
        f"x-ratelimit-reset-{kind}": as_duration(allowance.reset_s),
    }
