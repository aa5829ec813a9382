# SPDX-License-Identifier: Apache-2.0
"""Windows of the limits: exact under concurrency, the same on memory and on Redis, by clocks that do not jump."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage

from fakes.redis_server import fake_pool, redis_server
from wavetrain_gateway.limits.monotonic_storage import MonotonicStorage
from wavetrain_gateway.limits.rate import as_duration, sliding_wait_s
from wavetrain_gateway.limits.redis_storage import RefundingRedisStorage
from wavetrain_gateway.limits.storage import RefundingStorage
from wavetrain_gateway.limits.windows import WINDOW_S, TokenHold, Windows


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture(params=["memory", "fakeredis", "redis"])
async def storage(request: pytest.FixtureRequest) -> AsyncIterator[RefundingStorage]:
    if request.param == "memory":
        yield MonotonicStorage()
        return
    if request.param == "fakeredis":
        redis = RefundingRedisStorage(fake_pool(fakeredis.FakeServer()))
    else:
        redis = RefundingRedisStorage.at(request.getfixturevalue("redis_url"))
    await redis.reset()
    yield redis
    await redis.close()


def windows_on(storage: RefundingStorage) -> Windows:
    return Windows(storage, storage_clock=None if isinstance(storage, MonotonicStorage) else time.time)


async def test_200_requests_at_once_are_counted_to_the_request(storage: RefundingStorage) -> None:
    windows = windows_on(storage)
    let_in = await asyncio.gather(*(windows.take_request("key", 50) for _ in range(200)))
    assert sum(let_in) == 50
    assert (await windows.requests("key", 50)).remaining == 0
    assert 0 < (await windows.requests("key", 50)).reset_s <= WINDOW_S
    assert await windows.take_request("other", 50)


async def test_200_weighted_hits_at_once_are_counted_to_the_token(storage: RefundingStorage) -> None:
    windows = windows_on(storage)
    holds = await asyncio.gather(*(windows.take_tokens("key", 5_000, 30) for _ in range(200)))
    taken = [hold for hold in holds if hold is not None]
    assert len(taken) == 166
    assert (await windows.tokens("key", 5_000)).remaining == 20
    await asyncio.gather(*(windows.settle_tokens("key", 5_000, hold, 10) for hold in taken))
    assert (await windows.tokens("key", 5_000)).remaining == 5_000 - 166 * 10


async def test_what_a_request_used_beyond_its_reservation_is_counted_too(storage: RefundingStorage) -> None:
    windows = windows_on(storage)
    hold = await windows.take_tokens("key", 100, 60)
    assert hold is not None
    await windows.settle_tokens("key", 100, hold, 250)
    assert (await windows.tokens("key", 100)).remaining == 0
    assert await windows.take_tokens("key", 100, 1) is None
    assert await windows.wait_for_tokens_s("key", 100, 100) > WINDOW_S


async def test_a_refund_takes_nothing_from_what_others_reserved(storage: RefundingStorage) -> None:
    for is_shifted in (True, False):
        await storage.refund_sliding_window_entry("none", WINDOW_S, 5, is_shifted=is_shifted)
    assert (await storage.get_sliding_window("none", WINDOW_S))[::2] == (0, 0)
    assert await storage.acquire_sliding_window_entry("k", 100, WINDOW_S, 7)
    await storage.refund_sliding_window_entry("k", WINDOW_S, 50, is_shifted=True)
    assert (await storage.get_sliding_window("k", WINDOW_S))[::2] == (0, 7)
    await storage.refund_sliding_window_entry("k", WINDOW_S, 50, is_shifted=False)
    assert (await storage.get_sliding_window("k", WINDOW_S))[::2] == (0, 0)


async def test_a_request_does_not_count_longer_than_a_minute() -> None:
    clock = Clock()
    windows = Windows(MonotonicStorage(clock), clock=clock)
    for _ in range(3):
        assert await windows.take_request("key", 3)
        clock.now_s += 10
    assert not await windows.take_request("key", 3)
    allowance = await windows.requests("key", 3)
    assert (allowance.remaining, allowance.reset_s) == (0, pytest.approx(30))
    clock.now_s += 30
    assert await windows.take_request("key", 3)
    assert not await windows.take_request("key", 3)


async def test_a_refund_after_the_window_moved_on_goes_to_where_the_hit_is_counted() -> None:
    clock = Clock()
    windows = Windows(MonotonicStorage(clock), clock=clock)
    early = await windows.take_tokens("key", 1_000, 600)
    assert early is not None
    clock.now_s += 90  # half of the window before still counts
    late = await windows.take_tokens("key", 1_000, 100)
    assert late is not None
    assert (await windows.tokens("key", 1_000)).remaining == 1_000 - 300 - 100
    await windows.settle_tokens("key", 1_000, early, 200)
    assert (await windows.tokens("key", 1_000)).remaining == 1_000 - 100 - 100
    clock.now_s += 30
    await windows.settle_tokens("key", 1_000, TokenHold(600, 0.0, clock.now_s), 0)  # counts no more: nothing to refund
    assert (await windows.tokens("key", 1_000)).remaining == 1_000 - 100
    clock.now_s += 1_000
    assert (await windows.tokens("key", 1_000)).remaining == 1_000


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 9)), min_size=1, max_size=40),
)
def test_no_minute_has_more_requests_than_the_limit(limit: int, steps: list[tuple[float, int]]) -> None:
    async def run() -> None:
        clock = Clock()
        storage = MonotonicStorage(clock)
        let_in: list[float] = []
        for wait_s, attempts in steps:
            clock.now_s += wait_s
            free = limit - sum(moment > clock.now_s - WINDOW_S for moment in let_in)
            taken = [await storage.acquire_entry("key", limit, WINDOW_S) for _ in range(attempts)]
            let_in += [clock.now_s] * sum(taken)
            assert sum(taken) == min(attempts, free)  # neither more than the limit, nor fewer than there is room for

    asyncio.run(run())


@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 500), st.integers(0, 500)), min_size=1, max_size=30),
)
def test_the_wait_for_tokens_is_what_it_takes(limit: int, steps: list[tuple[float, int, int]]) -> None:
    async def run() -> None:
        clock = Clock()
        windows = Windows(MonotonicStorage(clock), clock=clock)
        for wait_s, wanted, used in steps:
            amount = min(wanted, limit)
            clock.now_s += wait_s
            needed_s = await windows.wait_for_tokens_s("key", limit, amount)
            hold = await windows.take_tokens("key", limit, amount)
            if hold is not None:
                assert needed_s == 0
            else:
                clock.now_s += needed_s + 0.01
                hold = await windows.take_tokens("key", limit, amount)
                assert hold is not None
            await windows.settle_tokens("key", limit, hold, min(used, amount))
            assert 0 <= (await windows.tokens("key", limit)).remaining <= limit

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 20))
def test_memory_counts_as_the_library_does(steps: list[tuple[int, int]], limit: int) -> None:
    """Our storage against the library's, whose clock stands where ours stands."""

    async def run(patch: pytest.MonkeyPatch) -> None:
        # Windows of the library's memory storage begin at multiples of their length, ours with the first hit.
        clock = Clock(1200.0)
        patch.setattr(time, "time", clock)
        ours, theirs = MonotonicStorage(clock), MemoryStorage()
        for wait_s, amount in steps:
            expected = await theirs.acquire_entry("m", limit, WINDOW_S, amount)
            assert await ours.acquire_entry("m", limit, WINDOW_S, amount) == expected
            clock.now_s += wait_s + 0.47  # never the very end of a window, where the library is of two minds
            assert (await ours.get_moving_window("m", limit, WINDOW_S))[1] == (
                await theirs.get_moving_window("m", limit, WINDOW_S)
            )[1]
            assert await ours.incr("f", 30, amount) == await theirs.incr("f", 30, amount)

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(run(patch))


async def test_memory_forgets_keys_that_are_gone() -> None:
    clock = Clock()
    storage = MonotonicStorage(clock)
    for number in range(20_000):
        await storage.acquire_entry(f"a{number}", 5, WINDOW_S)
        await storage.acquire_sliding_window_entry(f"b{number}", 5, WINDOW_S)
        clock.now_s += 0.1
    assert len(storage) < 10_000
    assert await storage.reset() > 0
    assert len(storage) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.85, "850ms"),
        (1, "1s"),
        (1.2, "2s"),
        (59.5, "1m0s"),
        (360, "6m0s"),
        (75, "1m15s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert as_duration(seconds) == text


def test_an_empty_window_needs_no_wait() -> None:
    assert sliding_wait_s((0, 0.0, 0, 0.0), 60, 0) == 0
    assert sliding_wait_s((10, 30.0, 0, 90.0), 60, 5) == pytest.approx(0)
