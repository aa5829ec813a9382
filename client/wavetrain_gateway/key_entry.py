# SPDX-License-Identifier: Apache-2.0
"""What a key file says of one API key, and of a tier of them."""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timezone
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from wavetrain_gateway.admission import Caller

_NUM_ID_CHARS = 12
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Limit = Annotated[int, Field(ge=1, le=10**9)]


def _in_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


class TierEntry(BaseModel):
    """What the keys of a tier have in common; a key's own setting wins.

    Attributes:
        priority: of the tier's requests; lower runs earlier. A request may ask for a later turn, not an earlier one.
        requests_per_minute: None: no limit, as for the next two.
        tokens_per_minute: prompt and output tokens together.
        max_streams: sequences that run at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_streams: Limit | None = None


# Tiers that need no table in the file.
BUILT_IN_TIERS = {"premium": TierEntry(priority=-10), "default": TierEntry(), "batch": TierEntry(priority=10)}


class KeyEntry(BaseModel):
    """One API key: its hash, and what it allows.

    Attributes:
        name: for people; unique in its file.
        sha256: of the key, 64 hexadecimal digits. The key itself is stored nowhere.
        models: public names and aliases that may be asked for; None: all.
        tier: a tier's name.
        cache_salt: keys of one salt share the prefix cache; None: the key shares it with no other.
        is_cache_shared: whether the response cache may answer it with what other keys asked for.
        expires: when it stops being known; UTC where no zone is given.
        is_enabled: False where it is not known for the time being.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=_NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    models: Annotated[frozenset[str], Field(strict=False, min_length=1)] | None = None
    tier: str = "default"
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_streams: Limit | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    is_cache_shared: bool = False
    expires: Annotated[datetime, Field(strict=False), AfterValidator(_in_utc)] | None = None
    is_enabled: bool = True

    @property
    def id(self) -> str:
        """The start of the hash: what metrics and logs call the key."""
        return self.sha256[:_NUM_ID_CHARS]

    def is_valid_at(self, moment: datetime) -> bool:
        """Whether the key may be used at this moment."""
        return self.is_enabled and (self.expires is None or moment < self.expires)

    def caller(self, tier: TierEntry) -> Caller:
        """Who asks with this key."""
        return Caller(
            name=self.id,
            models=self.models,
            best_priority=tier.priority,
            priority=tier.priority,
            cache_salt=self._salt(),
            tier=self.tier,
            is_cache_shared=self.is_cache_shared,
        )

    def limits(self, tier: TierEntry) -> TierEntry:
        """The limits that hold for the key: its own, else its tier's."""
        own = self.model_dump(include={"requests_per_minute", "tokens_per_minute", "max_streams"}, exclude_none=True)
        return tier.model_copy(update=own)

    def _salt(self) -> str:
        # Derived, so that it stays the same over restarts and gateways, and tells nothing of the hash. A shared salt
        # goes another way than a derived one: nobody can write another key's.
        kind, secret = ("shared", self.cache_salt) if self.cache_salt is not None else ("key", self.sha256)
        return hmac.new(secret.encode(), f"wavetrain cache salt {kind}".encode(), hashlib.sha256).hexdigest()[:32]


class KeyTable(BaseModel):
    """A whole key file: `[[key]]` tables, and `[tier.NAME]` tables that add to or replace the built-in tiers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    keys: Annotated[list[KeyEntry], Field(alias="key", min_length=1)]
    tiers: Annotated[dict[str, TierEntry], Field(alias="tier")] = {}

    @model_validator(mode="after")
    def _check(self) -> KeyTable:
        for word, values in (("name", [key.name for key in self.keys]), ("sha256", [key.id for key in self.keys])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"two keys have the {word} {twice[0]!r}; each key needs its own")
        for key in self.keys:
            if key.tier not in self.tiers and key.tier not in BUILT_IN_TIERS:
                known = ", ".join(sorted({*self.tiers, *BUILT_IN_TIERS}))
                raise ValueError(f"key {key.name!r}: there is no tier {key.tier!r}; known are {known}")
        return self

    def tier(self, name: str) -> TierEntry:
        """The tier of this name, which exists."""
        return self.tiers[name] if name in self.tiers else BUILT_IN_TIERS[name]
