# SPDX-License-Identifier: Apache-2.0
"""The response cache's answers on a Redis server, for several gateways. How much it holds is its `maxmemory`."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis

_PREFIX = "wavetrain:answer:"
_CONNECT_TIMEOUT_S = 0.5


class RedisStore:
    """Keeps answers for a time.

    Raises:
        ValueError: the address is no Redis URL.
    """

    def __init__(self, url: str, *, ttl_s: float) -> None:
        self._ttl_ms = max(1, round(ttl_s * 1000))
        kind = cast("Any", Redis)  # its types are partly unknown
        self._redis = kind.from_url(url, socket_connect_timeout=_CONNECT_TIMEOUT_S, socket_timeout=_CONNECT_TIMEOUT_S)

    async def get(self, key: str) -> bytes | None:
        """Returns what is kept under a key. Raises what the Redis client raises."""
        value: object = await self._redis.get(_PREFIX + key)
        return value if isinstance(value, bytes) else None

    async def set(self, key: str, value: bytes) -> None:
        """Keeps a value. Raises what the Redis client raises."""
        await self._redis.set(_PREFIX + key, value, px=self._ttl_ms)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()
