# SPDX-License-Identifier: Apache-2.0
"""The response cache: exact repeats of deterministic requests are answered with what was generated before.

A request is deterministic with temperature 0 or a seed. The key is a hash of all that decides the tokens, and of the
caller, unless callers may share; so nothing of a prompt is kept but in the answer itself. A cache that fails is a
miss: it never fails a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from wavetrain_gateway.admission import Caller
from wavetrain_gateway.plan import Plan
from wavetrain_gateway.settings import CacheSettings

_KEPT_REASONS = ("stop", "length")
_STORE_TIMEOUT_S = 0.05


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer's whole body, as it was first given."""

    body: dict[str, Any]


class AnswerStore(Protocol):
    """Where answers are kept. What goes wrong is raised, whatever it is."""

    async def get(self, key: str) -> bytes | None:
        """Returns what is kept under a key and is not too old."""
        ...

    async def set(self, key: str, value: bytes) -> None:
        """Keeps a value for the time the store was made with."""
        ...

    async def close(self) -> None:
        """Lets go of everything."""
        ...


class MemoryStore:
    """Keeps answers in this process, up to a number of bytes; the least recently used go first."""

    def __init__(self, *, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """What is kept now, keys included."""
        return self._num_bytes

    async def get(self, key: str) -> bytes | None:
        """Returns what is kept under a key and is not too old."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] < self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry[1]

    async def set(self, key: str, value: bytes) -> None:
        """Keeps a value, and drops the least recently used ones that have no room beside it."""
        self._drop(key)
        size = len(key) + len(value)
        if size > self._max_bytes:
            return
        self._entries[key] = (self._clock() + self._ttl_s, value)
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    async def close(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self._num_bytes = 0

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._num_bytes -= len(key) + len(entry[1])


class ResponseCache:
    """Finds and keeps answers.

    Args:
        store: None: there is no cache.
        on_lookup: told of every lookup, whether it found something.
        on_failure: told of what goes wrong in the store.
    """

    def __init__(
        self,
        settings: CacheSettings,
        store: AnswerStore | None,
        *,
        on_lookup: Callable[[bool], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._on_lookup = on_lookup
        self._on_failure = on_failure

    def may_keep(self, plan: Plan) -> bool:
        """Whether the request is one whose answer is kept."""
        return self._store is not None and plan.is_repeatable

    async def find(self, plan: Plan, caller: Caller) -> CachedAnswer | None:
        """Returns the answer to an earlier request like this one."""
        if self._store is None:
            return None
        try:
            value = await asyncio.wait_for(self._store.get(self._key(plan, caller)), _STORE_TIMEOUT_S)
            found = None if value is None else CachedAnswer(json.loads(value))
        except Exception as error:  # a store is someone else's process: whatever it does is a miss
            self._on_failure(error)
            found = None
        self._on_lookup(found is not None)
        return found

    async def keep(self, plan: Plan, caller: Caller, body: dict[str, Any]) -> None:
        """Keeps an answer, where it is whole and not too large."""
        if self._store is None or not plan.is_repeatable:
            return
        if any(choice["finish_reason"] not in _KEPT_REASONS for choice in body["choices"]):
            return
        value = json.dumps(body).encode()
        if len(value) > self._settings.max_entry_bytes:
            return
        try:
            await asyncio.wait_for(self._store.set(self._key(plan, caller), value), _STORE_TIMEOUT_S)
        except Exception as error:  # as above
            self._on_failure(error)

    async def close(self) -> None:
        """Lets go of the store."""
        if self._store is not None:
            await self._store.close()

    def _key(self, plan: Plan, caller: Caller) -> str:
        owner = "*" if self._settings.is_shared or caller.is_cache_shared else caller.name
        return hashlib.sha256(f"{owner}\0{plan.fingerprint()}".encode()).hexdigest()


def cached_pieces(plan: Plan, body: dict[str, Any]) -> list[str]:
    """A kept answer as the chunks of a stream."""
    head = {name: body[name] for name in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if plan.is_chat else "text_completion"
    events: list[dict[str, Any]] = []
    for choice in cast("list[dict[str, Any]]", body["choices"]):
        if not plan.is_chat:
            events.append({**head, "choices": [choice]})
            continue
        base = {"index": choice["index"], "logprobs": None, "finish_reason": None}
        message = choice["message"]
        events.append({**head, "choices": [{**base, "delta": {"role": "assistant", "content": ""}}]})
        told = {**base, "delta": {"content": message["content"]}, "logprobs": choice["logprobs"]}
        events.append({**head, "choices": [told]})
        events.append({**head, "choices": [{**base, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if plan.has_usage:
        events.append({**head, "choices": [], "usage": body["usage"]})
    return [json.dumps(event) for event in events]
