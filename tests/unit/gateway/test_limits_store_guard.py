# SPDX-License-Identifier: Apache-2.0
"""A shared store that is slow or gone holds no request up; one that is busy is not taken for gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from wavetrain_gateway.limits.store_guard import StoreDown, StoreGuard


class Store:
    """Answers when it is told to, or fails."""

    def __init__(self) -> None:
        self.is_there = True
        self.num_pings = 0
        self.is_disconnected = False

    async def ping(self) -> None:
        self.num_pings += 1
        if not self.is_there:
            raise ConnectionRefusedError("nobody there")

    async def disconnect(self) -> None:
        self.is_disconnected = True

    async def answer(self) -> int:
        if not self.is_there:
            raise ConnectionResetError("gone")
        return 7


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
async def guard(store: Store) -> AsyncIterator[StoreGuard]:
    guard = StoreGuard(store.ping, (KeyError,), store.disconnect, timeout_s=0.2, probe_period_s=0.001)
    yield guard
    await guard.close()
    assert store.is_disconnected


async def test_an_answer_is_passed_on(guard: StoreGuard, store: Store) -> None:
    await guard.start()
    assert await guard.call(store.answer) == 7
    assert (guard.num_failures, guard.is_down) == (0, False)


async def test_a_store_that_is_gone_is_asked_once_and_taken_back_when_it_answers(
    guard: StoreGuard, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.is_there = False
    with pytest.raises(StoreDown):
        await guard.call(store.answer)
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        return 7

    for _ in range(10):
        with pytest.raises(StoreDown):
            await guard.call(ask)
    assert (asked, guard.num_failures) == (0, 1)
    store.is_there = True
    while guard.is_down:
        await asyncio.sleep(0.001)
    assert await guard.call(ask) == 7
    assert "does not answer" in caplog.text
    assert "answers again" in caplog.text


async def test_a_store_that_is_missing_at_the_start_is_waited_for_in_the_background(
    guard: StoreGuard, store: Store
) -> None:
    store.is_there = False
    await guard.start()
    assert guard.is_down
    store.is_there = True
    while guard.is_down:
        await asyncio.sleep(0.001)


async def test_a_silent_store_is_given_up(guard: StoreGuard) -> None:
    was_cancelled = asyncio.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    with pytest.raises(StoreDown):
        await guard.call(never)
    await asyncio.wait_for(was_cancelled.wait(), 30)


async def test_many_waiting_for_a_busy_store_are_no_outage(store: Store) -> None:
    # 40 calls, answered one by one, each sooner than the time-out and all together far later.
    guard = StoreGuard(store.ping, (), store.disconnect, timeout_s=0.5)
    turn = asyncio.Lock()

    async def in_turn() -> int:
        async with turn:
            await asyncio.sleep(0.02)
            return 7

    assert await asyncio.gather(*(guard.call(in_turn) for _ in range(40))) == [7] * 40
    assert guard.num_failures == 0
    await guard.close()


async def test_the_callers_own_cancel_is_no_fault_of_the_store(guard: StoreGuard) -> None:
    call = asyncio.create_task(guard.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert guard.num_failures == 0


async def test_a_mistake_of_ours_is_not_hidden(guard: StoreGuard) -> None:
    async def wrong() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await guard.call(wrong)
    assert not guard.is_down
