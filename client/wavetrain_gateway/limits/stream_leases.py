# SPDX-License-Identifier: Apache-2.0
"""Running sequences of keys on a Redis server, for gateways that share limits.

A request that runs has a lease there: a member of its key's sorted set for each of its sequences, scored with when it
expires, by the server's clock. Its gateway renews it while it runs; a gateway that died renews nothing, and what it
ran counts no more when the leases have expired. Every call is one script, so one step of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

LEASE_S = 30.0
_PREFIX = "wavetrain:limits:streams:"

# KEYS: of the API key. ARGV: its limit, a lease's life in ms, the lease's name, its sequences.
# Returns whether it was taken, and how many run now.
_TAKE = """
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('zremrangebyscore', KEYS[1], '-inf', now)
local running = redis.call('zcard', KEYS[1])
local count = tonumber(ARGV[4])
if running + count > tonumber(ARGV[1]) then
    return {0, running}
end
for number = 1, count do
    redis.call('zadd', KEYS[1], now + ARGV[2], ARGV[3] .. ':' .. number)
end
redis.call('pexpire', KEYS[1], ARGV[2])
return {1, running + count}
"""
# ARGV: a lease's life in ms, then names and numbers of sequences in turn. A lease that has expired begins again.
_RENEW = """
local time = redis.call('time')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for index = 2, #ARGV, 2 do
    for number = 1, ARGV[index + 1] do
        redis.call('zadd', KEYS[1], now + ARGV[1], ARGV[index] .. ':' .. number)
    end
end
redis.call('pexpire', KEYS[1], ARGV[1])
"""
# ARGV: the lease's name, its sequences.
_GIVE_BACK = """
for number = 1, ARGV[2] do
    redis.call('zrem', KEYS[1], ARGV[1] .. ':' .. number)
end
"""


class StreamLeases(Protocol):
    """Where gateways count running sequences together. What goes wrong there is raised as it is."""

    async def take(self, key_id: str, limit: int, lease: str, count: int) -> tuple[bool, int]:
        """Counts `count` more, if that does not make them more than `limit`. Returns whether, and how many run."""
        ...

    async def renew(self, key_id: str, leases: Mapping[str, int]) -> None:
        """Says that these still run: sequences by lease."""
        ...

    async def give_back(self, key_id: str, lease: str, count: int) -> None:
        """Counts a lease's sequences no more."""
        ...


class RedisStreamLeases:
    """Leases on one Redis server.

    Args:
        redis: an asyncio client of it; not closed here.
        lease_s: how long the sequences of a gateway that has died still count.
    """

    def __init__(self, redis: Any, *, lease_s: float = LEASE_S) -> None:
        self._redis = redis
        self._lease_ms = round(lease_s * 1000)
        self._take = redis.register_script(_TAKE)
        self._renew = redis.register_script(_RENEW)
        self._give_back = redis.register_script(_GIVE_BACK)

    async def take(self, key_id: str, limit: int, lease: str, count: int) -> tuple[bool, int]:
        """Counts `count` more, if that does not make them more than `limit`. Returns whether, and how many run."""
        is_taken, running = await self._take([_PREFIX + key_id], [limit, self._lease_ms, lease, count])
        return bool(is_taken), int(running)

    async def renew(self, key_id: str, leases: Mapping[str, int]) -> None:
        """Says that these still run: sequences by lease."""
        pairs = [part for lease in leases.items() for part in lease]
        await self._renew([_PREFIX + key_id], [self._lease_ms, *pairs])

    async def give_back(self, key_id: str, lease: str, count: int) -> None:
        """Counts a lease's sequences no more."""
        await self._give_back([_PREFIX + key_id], [lease, count])

    async def warm_up(self) -> None:
        """Brings the scripts to the server. Raises what the Redis client raises."""
        for script in (self._take, self._renew, self._give_back):
            await self._redis.script_load(script.script)
