# SPDX-License-Identifier: Apache-2.0
"""Who may ask for how much: the seam between the request handlers and keys and limits.

A handler calls `authenticate` before it reads a body, `admit` before it asks a replica for anything, and `settle` on
the ticket exactly once, whatever became of the request. `OpenAdmission` lets everybody do everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and what the key allows.

    Attributes:
        name: a short hash of the key, for metrics and logs; "anonymous" where no keys are configured.
        models: public model names and aliases that may be asked for; None: all.
        best_priority: the least number (so the earliest turn) a request may have; None: any.
        priority: what a request has that names none.
        cache_salt: mixed into every request's salt, so that callers do not share the prefix cache; "" shares it.
        tier: the key's tier, for routing rules.
        is_cache_shared: whether the response cache may answer this caller with what others asked for.
    """

    name: str = "anonymous"
    models: frozenset[str] | None = None
    best_priority: int | None = None
    priority: int | None = None
    cache_salt: str = ""
    tier: str = "default"
    is_cache_shared: bool = False

    def may_use(self, model: str) -> bool:
        """Whether the key allows the model."""
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request would use, as far as it is known before it runs.

    Attributes:
        model: public name.
        num_prompt_tokens: an estimate, exact where the prompt is token ids.
        max_output_tokens: over all prompts and choices.
        num_streams: sequences that run at once.
    """

    model: str
    num_prompt_tokens: int
    max_output_tokens: int
    num_streams: int = 1


class Ticket(Protocol):
    """A request that was let in."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The x-ratelimit-* headers of the answer; empty where there are no limits."""
        ...

    async def settle(self, num_tokens: int) -> None:
        """Ends the request: gives its stream back, and what it did not use of its tokens. Never raises.

        Args:
            num_tokens: prompt and output tokens that were really used; 0 where nothing ran.
        """
        ...


class Admission(Protocol):
    """Keys and limits. Made once per process; all calls come from its event loop."""

    async def start(self) -> None:
        """Reads what it needs. Raises OSError or ValueError where that cannot be done."""
        ...

    async def close(self) -> None:
        """Lets go of everything. Idempotent."""
        ...

    def authenticate(self, headers: Mapping[str, str], client_host: str) -> Caller:
        """Says who asks.

        Args:
            headers: the request's, names in lower case.
            client_host: the peer's address, "" where there is none.

        Raises:
            Unauthenticated: no key, or none that is known.
            RateLimited: too many wrong keys from this address.
        """
        ...

    async def admit(self, caller: Caller, demand: Demand) -> Ticket:
        """Lets a request in, counting it.

        Raises:
            RateLimited: with Retry-After and the x-ratelimit-* headers; nothing was counted then.
            Forbidden: the key may not use the model.
        """
        ...


class OpenTicket:
    """A ticket without limits."""

    @property
    def headers(self) -> Mapping[str, str]:
        """None."""
        return {}

    async def settle(self, num_tokens: int) -> None:
        """Nothing was taken."""


class OpenAdmission:
    """Everybody may do everything: where no keys are configured."""

    async def start(self) -> None:
        """Needs nothing."""

    async def close(self) -> None:
        """Has nothing."""

    def authenticate(self, headers: Mapping[str, str], client_host: str) -> Caller:
        """Everybody is the same caller."""
        return Caller()

    async def admit(self, caller: Caller, demand: Demand) -> Ticket:
        """Always."""
        return OpenTicket()
