# SPDX-License-Identifier: Apache-2.0
"""Streams of a key over two gateways that share a store: exact, and given back whatever becomes of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import fakeredis
import pytest

from fakes.redis_server import fake_pool, redis_server
from wavetrain_gateway.errors import Unavailable
from wavetrain_gateway.limits.redis_storage import RefundingRedisStorage
from wavetrain_gateway.limits.shared_streams import GuardedLeases, SharedStreams, StreamHold, StreamsFull
from wavetrain_gateway.limits.shared_windows import WhenDown
from wavetrain_gateway.limits.store_guard import StoreGuard
from wavetrain_gateway.limits.stream_leases import RedisStreamLeases

_LEASE_S = 1.5
_KEY = "k"


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


class Gateway:
    """What one gateway has of the store; it can be cut off from it."""

    def __init__(self, storage: RefundingRedisStorage, when_down: WhenDown, lease_s: float) -> None:
        self.is_cut_off = False
        self.storage = storage
        self.leases = RedisStreamLeases(storage.client, lease_s=lease_s)
        self.guard = StoreGuard(self._ping, (), storage.close, timeout_s=20, probe_period_s=0.01)
        store = GuardedLeases(self, self.guard)
        self.streams = SharedStreams(store, when_down=when_down, renew_period_s=lease_s / 3)

    async def _ping(self) -> None:
        if self.is_cut_off:
            raise ConnectionError("cut off")
        await self.leases.warm_up()

    async def take(self, *arguments: Any) -> tuple[bool, int]:
        await self._ping()
        return await self.leases.take(*arguments)

    async def renew(self, *arguments: Any) -> None:
        await self._ping()
        await self.leases.renew(*arguments)

    async def give_back(self, *arguments: Any) -> None:
        await self._ping()
        await self.leases.give_back(*arguments)


MakeGateway = Callable[..., Gateway]


@pytest.fixture(params=["fakeredis", "redis"])
async def make_gateway(request: pytest.FixtureRequest) -> AsyncIterator[MakeGateway]:
    server = fakeredis.FakeServer()
    url: str = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    async with AsyncExitStack() as stack:

        def make(when_down: WhenDown = "open", lease_s: float = 60.0) -> Gateway:
            storage = RefundingRedisStorage.at(url) if url else RefundingRedisStorage(fake_pool(server))
            gateway = Gateway(storage, when_down, lease_s)
            gateway.streams.start()
            stack.push_async_callback(gateway.guard.close)
            stack.push_async_callback(gateway.streams.close)
            return gateway

        yield make
        cleaner = make()
        await cleaner.storage.client.flushall()


async def take(gateway: Gateway, limit: int = 5, count: int = 1) -> StreamHold:
    return await gateway.streams.take(_KEY, limit, count)


async def is_full(gateway: Gateway, limit: int = 5, count: int = 1) -> bool:
    try:
        hold = await take(gateway, limit, count)
    except StreamsFull:
        return True
    await gateway.streams.give_back(hold)
    return False


async def until(is_true: Callable[[], Any], timeout_s: float = 20.0) -> None:
    async def wait() -> None:
        while not await is_true():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), timeout_s)


async def test_200_requests_at_once_on_two_gateways_are_let_in_to_the_stream(make_gateway: MakeGateway) -> None:
    one, other = make_gateway(), make_gateway()
    answers = await asyncio.gather(
        *(take((one, other)[number % 2], 37) for number in range(200)), return_exceptions=True
    )
    holds = [answer for answer in answers if isinstance(answer, StreamHold)]
    assert len(holds) == 37
    assert one.streams.running(_KEY) + other.streams.running(_KEY) == 37
    assert all(answer.num_running == 37 for answer in answers if isinstance(answer, StreamsFull))
    owner = {id(hold): (one, other)[number % 2] for number, hold in enumerate(answers) if isinstance(hold, StreamHold)}
    for hold in holds[:10]:
        await owner[id(hold)].streams.give_back(hold)
    assert not await is_full(one, 37, count=10)
    assert await is_full(other, 37, count=11)


async def test_requests_of_several_sequences_weigh_as_much(make_gateway: MakeGateway) -> None:
    one, other = make_gateway(), make_gateway()
    hold = await take(one, count=3)
    with pytest.raises(StreamsFull) as full:
        await take(other, count=3)
    assert full.value.num_running == 3
    assert not await is_full(other, count=2)
    assert await one.streams.take("another key", 1, 1)
    await one.streams.give_back(hold)
    assert not await is_full(other, count=5)


async def test_what_runs_counts_for_longer_than_a_lease(make_gateway: MakeGateway) -> None:
    one, other = make_gateway(lease_s=_LEASE_S), make_gateway(lease_s=_LEASE_S)
    hold = await take(one, count=5)
    for _ in range(8):
        await asyncio.sleep(_LEASE_S / 4)
        assert await is_full(other)
    await one.streams.give_back(hold)
    assert not await is_full(other, count=5)


async def test_a_gateway_that_dies_gives_its_streams_back(make_gateway: MakeGateway) -> None:
    one, other = make_gateway(lease_s=_LEASE_S), make_gateway(lease_s=_LEASE_S)
    await take(one, count=5)
    assert await is_full(other)
    await one.streams.close()  # as a dead one, it renews nothing, and it gives nothing back

    async def has_room() -> bool:
        return not await is_full(other, count=5)

    await until(has_room)


async def test_while_the_store_is_away_each_counts_for_itself_and_tells_it_later(make_gateway: MakeGateway) -> None:
    one, other = make_gateway(lease_s=_LEASE_S), make_gateway(lease_s=_LEASE_S)
    early = await take(one, count=2)
    one.is_cut_off = True
    late = await take(one, count=3)  # two are counted here already
    assert await is_full(one)
    assert one.guard.is_down
    one.is_cut_off = False

    async def is_told() -> bool:
        return await is_full(other)

    await until(is_told)
    for hold in (early, late):
        await one.streams.give_back(hold)
    assert not await is_full(other, count=5)


async def test_closed_limits_refuse_while_the_store_is_away(make_gateway: MakeGateway) -> None:
    one = make_gateway("closed")
    hold = await take(one)
    one.is_cut_off = True
    with pytest.raises(Unavailable) as refused:
        await take(one)
    assert refused.value.code == "limits_unavailable"
    assert await one.streams.take(_KEY, None, 1)  # who has no limit needs no store
    await one.streams.give_back(hold)
    assert one.streams.running(_KEY) == 1


async def test_a_request_cancelled_on_its_way_in_holds_nothing(make_gateway: MakeGateway) -> None:
    one = make_gateway()
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    real_take = one.leases.take

    async def slow(*arguments: Any) -> tuple[bool, int]:
        answer = await real_take(*arguments)
        reached.set()
        await may_go_on.wait()
        return answer

    one.leases.take = slow  # type: ignore[method-assign]
    task = asyncio.create_task(take(one, count=5))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    one.leases.take = real_take  # type: ignore[method-assign]
    await one.streams.close()
    assert one.streams.running(_KEY) == 0
    assert not await is_full(one, count=5)


async def test_giving_back_waits_for_a_renewal_on_its_way(make_gateway: MakeGateway) -> None:
    one, other = make_gateway(lease_s=_LEASE_S), make_gateway(lease_s=_LEASE_S)
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    real_renew = one.leases.renew

    async def slow(*arguments: Any) -> None:
        reached.set()
        await may_go_on.wait()
        await real_renew(*arguments)

    one.leases.renew = slow  # type: ignore[method-assign]
    hold = await take(one, count=5)
    await reached.wait()
    giving_back = asyncio.create_task(one.streams.give_back(hold))
    await asyncio.sleep(0.05)
    assert not giving_back.done()
    may_go_on.set()
    await giving_back
    assert not await is_full(other, count=5)


async def test_alone_a_gateway_counts_in_memory() -> None:
    streams = SharedStreams()
    streams.start()
    hold = await streams.take(_KEY, 2, 2)
    with pytest.raises(StreamsFull):
        await streams.take(_KEY, 2, 1)
    await streams.give_back(hold)
    assert streams.running(_KEY) == 0
    await streams.close()
