# SPDX-License-Identifier: Apache-2.0
"""Windows on a Redis server, for gateways that share limits: the `limits` library's storage, with refunds.

Hits are the library's Lua scripts, each one step of the server. A refund is one more script over the same keys, whose
names are the library's: `{key}` the current window of a sliding counter, `{key}/-1` the one before.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from limits.aio.storage import RedisStorage
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

_KEY_PREFIX = "wavetrain:limits"
# A command waits for a free connection rather than for one more handshake.
_MAX_CONNECTIONS = 16
_CONNECT_TIMEOUT_S = 1.0

# KEYS: the window to take from. ARGV: how much. Never below nothing; the window's life stays as it was.
_REFUND = """
local count = tonumber(redis.call('get', KEYS[1])) or 0
local amount = math.min(tonumber(ARGV[1]), count)
if amount > 0 then
    redis.call('decrby', KEYS[1], amount)
end
return amount
"""


class RefundingRedisStorage(RedisStorage):
    """A storage of the `limits` library on one Redis server.

    A command is not repeated when it fails: whoever calls decides at once what else to do.

    Args:
        pool: connections to the server.

    Attributes:
        client: the asyncio client on these connections, for what else is counted on the server.
    """

    STORAGE_SCHEME = None  # pyright: ignore[reportAssignmentType] - it is not one that an address can name

    def __init__(self, pool: BlockingConnectionPool) -> None:
        self._pool = cast("Any", pool)
        # With a pool the library takes everything from it, and nothing from the address.
        super().__init__("async+redis://", implementation="redispy", key_prefix=_KEY_PREFIX, connection_pool=self._pool)
        self.client = cast("Any", self.bridge).get_connection()
        self._refund = self.client.register_script(_REFUND)

    @classmethod
    def at(cls, url: str) -> RefundingRedisStorage:
        """The storage on the server at `redis://[[user]:password@]host[:port][/db]`, `rediss://` or `unix://path`.

        Raises:
            ValueError: the address has another form.
        """
        pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType]
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=None,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
        )
        return cls(pool)

    async def refund_sliding_window_entry(self, key: str, expiry: int, amount: int, *, is_shifted: bool) -> None:
        """Takes back a part of a hit: from the window before where `is_shifted`, else from the current one.

        What is no longer counted there is not taken back from elsewhere.
        """
        window = self._previous_window_key(key) if is_shifted else self._current_window_key(key)
        await self._refund([self.bridge.prefixed_key(window)], [amount])

    async def warm_up(self) -> None:
        """Connects, and brings the scripts to the server: what the first requests would else have to wait for.

        Raises:
            redis.RedisError: the server does not answer.
        """
        bridge = cast("Any", self.bridge)
        scripts = (bridge.lua_acquire_moving_window, bridge.lua_moving_window, self._refund)
        sliding = (bridge.lua_acquire_sliding_window, bridge.lua_sliding_window)
        for script in (*scripts, *sliding):
            await self.client.script_load(script.script)
        await asyncio.gather(*(self.client.ping() for _ in range(_MAX_CONNECTIONS)))

    async def close(self) -> None:
        """Closes the connections."""
        await self.client.aclose()
        await self._pool.aclose()
