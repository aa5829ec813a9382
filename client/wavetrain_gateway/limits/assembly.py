# SPDX-License-Identifier: Apache-2.0
"""Puts keys, limits and their store together, as the gateway's settings say."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from wavetrain_gateway.admission import Admission, OpenAdmission
from wavetrain_gateway.keys import KeyRing, keys_from_text, parse_keys
from wavetrain_gateway.limits.keyed_admission import KeyedAdmission
from wavetrain_gateway.limits.monotonic_storage import MonotonicStorage
from wavetrain_gateway.limits.shared_streams import GuardedLeases, SharedStreams
from wavetrain_gateway.limits.shared_windows import GuardedStore, SharedWindows, WhenDown
from wavetrain_gateway.limits.store_guard import SILENCE_TIMEOUT_S, StoreGuard
from wavetrain_gateway.limits.stream_leases import RedisStreamLeases
from wavetrain_gateway.limits.windows import Windows
from wavetrain_gateway.limits.wrong_keys import DEFAULT_PER_MINUTE, WrongKeys
from wavetrain_gateway.watched_file import WatchedFile


class KeySettings(BaseModel):
    """Where keys come from and where their limits are counted: the table `[keys]` of gateway.toml.

    Attributes:
        file: TOML, or JSON by its name; read again when it changes. None: everybody is let in.
        redis_url: a server that several gateways share the counts of their keys on; None: each counts for itself.
        redis_timeout_s: how long it may be silent before it is left alone.
        redis_when_down: whether requests are let in by this process's counts then, or refused.
        wrong_keys_per_minute: unknown keys that one address may send before it is refused with 429.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Path | None = None
    redis_url: str | None = None
    redis_timeout_s: Annotated[float, Field(gt=0, le=10)] = SILENCE_TIMEOUT_S
    redis_when_down: WhenDown = "open"
    wrong_keys_per_minute: Annotated[int, Field(ge=1, le=100_000)] = DEFAULT_PER_MINUTE


def make_admission(settings: KeySettings, keys: str | None = None) -> Admission:
    """Builds the admission; everybody is let in where no keys are configured.

    Args:
        settings: the file and the store.
        keys: keys themselves, as an environment variable has them; without a key file only.

    Raises:
        OSError: the key file cannot be read.
        ValueError: keys or the store's address are wrong.
    """
    watched = None
    if settings.file is not None:
        if keys:
            raise ValueError("keys are given and a key file too; put all keys into the file")
        name = settings.file.name
        watched = WatchedFile(settings.file, lambda data: parse_keys(data, name), what="key file")
        ring = KeyRing(watched.load())
    elif keys:
        ring = KeyRing(keys_from_text(keys))
    else:
        return OpenAdmission()
    store = _make_store(settings.redis_url, settings.redis_timeout_s) if settings.redis_url is not None else None
    when_down = settings.redis_when_down
    return KeyedAdmission(
        ring,
        SharedWindows(Windows(MonotonicStorage()), None if store is None else store.windows, when_down=when_down),
        streams=SharedStreams(None if store is None else store.streams, when_down=when_down),
        key_file=watched,
        guard=None if store is None else store.windows.guard,
        wrong_keys=WrongKeys(settings.wrong_keys_per_minute),
    )


@dataclass(frozen=True, slots=True)
class _Store:
    """What is counted on one Redis server, under one guard."""

    windows: GuardedStore
    streams: GuardedLeases


def _make_store(redis_url: str, timeout_s: float) -> _Store:
    # The Redis client takes longer to import than all the rest of the gateway's limits, and most go without.
    from redis import RedisError

    from wavetrain_gateway.limits.redis_storage import RefundingRedisStorage

    storage = RefundingRedisStorage.at(redis_url)
    leases = RedisStreamLeases(storage.client)

    async def warm_up() -> None:
        await storage.warm_up()
        await leases.warm_up()

    guard = StoreGuard(warm_up, (RedisError,), storage.close, timeout_s=timeout_s)
    # Moving windows on Redis go by the time of day, which the gateways share.
    windows = Windows(storage, storage_clock=time.time)
    return _Store(GuardedStore(windows, guard), GuardedLeases(leases, guard))
